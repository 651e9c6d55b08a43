//! Frames: how messages stand in a byte stream. Pure bytes: no socket, no clock.
//!
//! A frame is a header and a body; [`HEADER`]'s table is the format. A frame is valid if and only if
//!  1. `len` is at most `BODY_LEN_MAX`,
//!  2. `flags` has no bit that is not known, and `reserved` is zero,
//!  3. `crc` is right,
//!  4. a compressed body says a length of at most `BODY_LEN_MAX` and unpacks to just that.
//!
//! (1) and (2) are checked when the header is there, before anything is allocated for the body.
//! After a fault the stream has no next frame: the connection is closed.

use crate::lento::message::BODY_LEN_MAX;

/// Frame header, little-endian; the body follows:
///  at  len  field
///   0    4  len       of the body as it travels, bytes, 0..=BODY_LEN_MAX
///   4    4  crc       CRC-32 of bytes 0..4, 8..24 and the body
///   8    2  op        which message the body is
///  10    2  flags     bit 0: an answer; bit 1: the body is compressed
///  12    4  reserved  zero
///  16    8  id        of a request, given by its sender; its answer repeats it
///
/// A compressed body is its unpacked length (u32) and one zstd frame.
pub const HEADER: usize = AT_ID + 8;

const AT_LEN: usize = 0;
const AT_CRC: usize = 4;
const AT_OP: usize = 8;
const AT_FLAGS: usize = 10;
const AT_RESERVED: usize = 12;
const AT_ID: usize = 16;
const _: () = assert!(HEADER == 24);

const FLAG_ANSWER: u16 = 1;
const FLAG_ZSTD: u16 = 2;
/// Bodies up to this length are not worth compressing, bytes.
const PLAIN_LEN_MAX: usize = 512;
const ZSTD_LEVEL: i32 = 1;
/// A decoder that is empty keeps at most so much memory, bytes: a server has one for each client.
const IDLE_LEN_MAX: usize = 2 << 10;

/// Why bytes are not a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    #[error("a frame of {0} bytes passes the bound of {BODY_LEN_MAX}")]
    TooLong(u64),
    #[error("a frame with flags {flags:#x} and reserved {reserved:#x}")]
    Flags { flags: u16, reserved: u32 },
    #[error("a frame whose checksum is wrong")]
    Crc,
    #[error("a compressed frame that cannot be unpacked")]
    Zstd,
}

/// One frame, its body unpacked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    pub op: u16,
    pub answer: bool,
    pub id: u64,
    pub body: Vec<u8>,
}

impl Frame {
    /// The frame's bytes; with `compress` its body is packed where that makes it smaller.
    ///
    /// # Errors
    /// `TooLong` when the body passes the bound.
    pub fn encode(&self, compress: bool) -> Result<Vec<u8>, Fault> {
        if self.body.len() > BODY_LEN_MAX {
            return Err(Fault::TooLong(self.body.len() as u64));
        }
        let mut flags = if self.answer { FLAG_ANSWER } else { 0 };
        let mut out = vec![0; HEADER];
        match compress.then(|| pack(&self.body)).flatten() {
            Some(packed) => {
                flags |= FLAG_ZSTD;
                out.extend_from_slice(&(self.body.len() as u32).to_le_bytes());
                out.extend_from_slice(&packed);
            }
            None => out.extend_from_slice(&self.body),
        }
        let len = (out.len() - HEADER) as u32;
        out[AT_LEN..AT_LEN + 4].copy_from_slice(&len.to_le_bytes());
        out[AT_OP..AT_OP + 2].copy_from_slice(&self.op.to_le_bytes());
        out[AT_FLAGS..AT_FLAGS + 2].copy_from_slice(&flags.to_le_bytes());
        out[AT_ID..AT_ID + 8].copy_from_slice(&self.id.to_le_bytes());
        let crc = crc(&out);
        out[AT_CRC..AT_CRC + 4].copy_from_slice(&crc.to_le_bytes());
        Ok(out)
    }
}

fn pack(body: &[u8]) -> Option<Vec<u8>> {
    if body.len() <= PLAIN_LEN_MAX {
        return None;
    }
    let packed = zstd::bulk::compress(body, ZSTD_LEVEL).ok()?;
    (packed.len() + 4 < body.len()).then_some(packed)
}

fn unpack(body: &[u8]) -> Result<Vec<u8>, Fault> {
    let (len, packed) = body.split_first_chunk::<4>().ok_or(Fault::Zstd)?;
    let len = u32::from_le_bytes(*len) as usize;
    if len > BODY_LEN_MAX {
        return Err(Fault::TooLong(len as u64));
    }
    let out = zstd::bulk::decompress(packed, len).map_err(|_| Fault::Zstd)?;
    if out.len() == len { Ok(out) } else { Err(Fault::Zstd) }
}

/// `frame`: a whole frame, at least a header long.
fn crc(frame: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&frame[..AT_CRC]);
    hasher.update(&frame[AT_OP..]);
    hasher.finalize()
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// Cuts a stream of bytes into frames. It holds at most one unfinished frame and what one `feed`
/// brought behind it.
#[derive(Default, Debug)]
pub struct Decoder {
    buf: Vec<u8>,
    at: usize,
}

impl Decoder {
    /// More bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.at > 0 {
            self.buf.drain(..self.at);
            self.at = 0;
        }
        self.buf.extend_from_slice(bytes);
    }
    /// The next whole frame; `None` until more bytes come.
    ///
    /// # Errors
    /// Why the stream goes on with something else; every later call says it again.
    pub fn poll(&mut self) -> Result<Option<Frame>, Fault> {
        let rest = &self.buf[self.at..];
        let Some(head) = rest.get(..HEADER) else {
            if rest.is_empty() && self.buf.capacity() > IDLE_LEN_MAX {
                *self = Decoder::default();
            }
            return Ok(None);
        };
        let (len, flags) = (u32_at(head, AT_LEN) as usize, u16_at(head, AT_FLAGS));
        let reserved = u32_at(head, AT_RESERVED);
        if len > BODY_LEN_MAX {
            return Err(Fault::TooLong(len as u64));
        }
        if flags & !(FLAG_ANSWER | FLAG_ZSTD) != 0 || reserved != 0 {
            return Err(Fault::Flags { flags, reserved });
        }
        let Some(frame) = rest.get(..HEADER + len) else { return Ok(None) };
        if crc(frame) != u32_at(head, AT_CRC) {
            return Err(Fault::Crc);
        }
        let body = &frame[HEADER..];
        let body = if flags & FLAG_ZSTD != 0 { unpack(body)? } else { body.to_vec() };
        let (op, id) = (u16_at(head, AT_OP), u64_at(head, AT_ID));
        self.at += HEADER + len;
        Ok(Some(Frame { op, answer: flags & FLAG_ANSWER != 0, id, body }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> impl Strategy<Value = Frame> {
        let body = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..2000),
            (0..3000usize, any::<u8>()).prop_map(|(n, b)| vec![b; n]),
        ];
        (any::<u16>(), any::<bool>(), any::<u64>(), body).prop_map(|(op, answer, id, body)| Frame {
            op,
            answer,
            id,
            body,
        })
    }

    fn drain(decoder: &mut Decoder) -> (Vec<Frame>, Option<Fault>) {
        let mut out = Vec::new();
        loop {
            match decoder.poll() {
                Ok(Some(frame)) => out.push(frame),
                Ok(None) => return (out, None),
                Err(fault) => return (out, Some(fault)),
            }
        }
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(list in prop::collection::vec(frames(), 1..5),
                                       compress: bool, piece in 1..700usize) {
            let mut bytes = Vec::new();
            for frame in &list {
                bytes.extend(frame.encode(compress).unwrap());
            }
            let (mut decoder, mut got) = (Decoder::default(), Vec::new());
            for piece in bytes.chunks(piece) {
                decoder.feed(piece);
                let (more, fault) = drain(&mut decoder);
                prop_assert_eq!(fault, None);
                got.extend(more);
            }
            prop_assert_eq!(got, list);
        }

        #[test]
        fn a_flipped_bit_never_gives_another_frame(frame in frames(), compress: bool, bit: usize) {
            let mut bytes = frame.encode(compress).unwrap();
            let bit = bit % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            prop_assert_eq!(drain(&mut decoder).0, Vec::new());
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            drain(&mut decoder);
        }

        #[test]
        fn garbage_in_a_right_frame_never_panics(body in prop::collection::vec(any::<u8>(), 0..600),
                                                 flags: u16) {
            let mut bytes = Frame { op: 1, answer: false, id: 1, body }.encode(false).unwrap();
            bytes[AT_FLAGS] = flags as u8 & 3;
            let sum = crc(&bytes);
            bytes[AT_CRC..AT_OP].copy_from_slice(&sum.to_le_bytes());
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            drain(&mut decoder);
        }
    }

    fn raw(len: u32, flags: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        bytes[AT_FLAGS..AT_RESERVED].copy_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(body);
        let sum = crc(&bytes);
        bytes[AT_CRC..AT_OP].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn fault(bytes: &[u8]) -> Option<Fault> {
        let mut decoder = Decoder::default();
        decoder.feed(bytes);
        drain(&mut decoder).1
    }

    #[test]
    fn a_decoder_that_rests_keeps_little() {
        let mut decoder = Decoder::default();
        let large = Frame { op: 1, answer: false, id: 1, body: vec![7; BODY_LEN_MAX] };
        decoder.feed(&large.encode(false).unwrap());
        assert_eq!(drain(&mut decoder), (vec![large], None));
        assert!(decoder.buf.capacity() <= IDLE_LEN_MAX);
    }

    #[test]
    fn a_giant_length_is_refused_from_the_header_alone() {
        let giant = raw(u32::MAX, 0, b"");
        assert_eq!(fault(&giant), Some(Fault::TooLong(u64::from(u32::MAX))));
        let over = raw(BODY_LEN_MAX as u32 + 1, 0, b"");
        assert_eq!(fault(&over), Some(Fault::TooLong(BODY_LEN_MAX as u64 + 1)));
        assert_eq!(fault(&raw(BODY_LEN_MAX as u32, 0, b"")), None);
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_unpacked() {
        let zeros = zstd::bulk::compress(&vec![0; BODY_LEN_MAX + 1], 1).unwrap();
        let mut says_all = (BODY_LEN_MAX as u32 + 1).to_le_bytes().to_vec();
        says_all.extend_from_slice(&zeros);
        let bytes = raw(says_all.len() as u32, FLAG_ZSTD, &says_all);
        assert_eq!(fault(&bytes), Some(Fault::TooLong(BODY_LEN_MAX as u64 + 1)));
        let mut says_less = 100u32.to_le_bytes().to_vec();
        says_less.extend_from_slice(&zeros);
        let bytes = raw(says_less.len() as u32, FLAG_ZSTD, &says_less);
        assert_eq!(fault(&bytes), Some(Fault::Zstd));
    }

    #[test]
    fn unknown_flags_are_refused() {
        assert_eq!(fault(&raw(0, 4, b"")), Some(Fault::Flags { flags: 4, reserved: 0 }));
    }

    #[test]
    fn a_body_that_packs_is_packed() {
        let frame = Frame { op: 1, answer: true, id: 7, body: vec![7; 4096] };
        assert!(frame.encode(true).unwrap().len() < 100);
        let small = Frame { body: vec![7; 512], ..frame };
        assert_eq!(small.encode(true).unwrap().len(), HEADER + 512);
    }

    #[test]
    fn a_body_beyond_the_bound_is_not_sent() {
        let frame = Frame { op: 1, answer: true, id: 7, body: vec![0; BODY_LEN_MAX + 1] };
        assert_eq!(frame.encode(true), Err(Fault::TooLong(BODY_LEN_MAX as u64 + 1)));
    }
}
