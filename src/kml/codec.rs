//! The bytes of the journal: every packing and unpacking of them, and nothing else (the bodies of
//! records are in body.rs). No I/O.
//!
//! A record is a header, a body, zeros up to a multiple of 8, and its length once more, so that the
//! log reads in both directions. All numbers are little-endian. man/imz-kml.5 says the same for
//! readers in other languages, and tests/kml_format.rs holds the two together.
//!
//! Bytes are a record (of this chain, at this place) if and only if
//!   1. at least `RECORD_LEN_MIN` bytes are there;
//!   2. `body_len` is at most `BODY_LEN_MAX`, and the whole record is there;
//!   3. the trailer holds the record's length;
//!   4. `seq` is the one that is due here;
//!   5. `chain` is the crc of the record before (in a segment's first record: the segment's seed);
//!   6. `crc` is the CRC-32 of bytes 8.. ; `chain` stands first among them and so seeds it;
//!   7. `outcome` is one of its three words; it is outside the crc, since it is set in place later.
//!
//! 1 to 7 are [`Suspect::verify`]. Bytes that pass were written by an imz, whole; if the body then
//! does not decode ([`Verified::decode`]), they come from a newer one, and are refused, not cut.
//!
//! One encoding serves journal and network: on the wire `chain`, `synced` and `outcome` are 0.
//!
//! Source: length at both ends from InterMezzo's journal; the chain and the numbered conditions
//! from SQLite's WAL (without the chain a stale record behind a cut comes back from the dead).

use crate::kml::record::{NODE_MAX, Op, Origin, PATH_LEN_MAX, Record, Seq, XATTR_LEN_MAX};

use self::body::{Reader, Writer};

/// Version of the format; no other is read.
pub const VERSION: u32 = 1;
/// First bytes of a segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"imz-kml\n";
/// Bytes of a segment's header.
pub const SEGMENT_HEADER_LEN: usize = 64;
/// Bytes of a record's header.
pub const HEADER_LEN: usize = 64;
/// Bytes of a record's trailer.
pub const TRAILER_LEN: usize = 8;
/// Shortest record, bytes.
pub const RECORD_LEN_MIN: usize = HEADER_LEN + TRAILER_LEN;
/// Longest body, bytes: two values of an extended attribute, a path, and the small things.
pub const BODY_LEN_MAX: usize = 2 * XATTR_LEN_MAX + PATH_LEN_MAX + 8192;
/// Longest record, bytes.
pub const RECORD_LEN_MAX: usize = HEADER_LEN + BODY_LEN_MAX + TRAILER_LEN;

/// Where the fields of a segment's header stand: the byte table of [`SegmentHead`].
pub mod segment_at {
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = 8;
    pub const NODE: usize = 12;
    pub const INCARNATION: usize = 16;
    pub const FIRST: usize = 32;
    pub const LEN: usize = 40;
    pub const SEED: usize = 48;
    pub const ZERO: usize = 52;
    pub const CRC: usize = 60;
}

/// Where the fields of a record's header stand.
///
/// ```text
///   at  len  field
///    0    4  crc          CRC-32 of bytes 8.. up to the record's end
///    4    4  outcome      0 intended, "DONE", "VOID"; outside the crc, set in place
///    8    4  chain        crc of the record before
///   12    4  body_len     bytes, 0..=BODY_LEN_MAX
///   16    8  seq          the record before + 1
///   24    8  synced       newest seq that was durable when this was appended
///   32    8  time_ns      since the Unix epoch
///   40    8  origin_seq   who made the change; 0: this node
///   48    4  origin_node
///   52    4  uid
///   56    4  gid
///   60    1  kind
///   61    3  zero
///   64       body, zeros up to a multiple of 8, then the record's length (8)
/// ```
pub mod record_at {
    pub const CRC: usize = 0;
    pub const OUTCOME: usize = 4;
    pub const CHAIN: usize = 8;
    pub const BODY_LEN: usize = 12;
    pub const SEQ: usize = 16;
    pub const SYNCED: usize = 24;
    pub const TIME_NS: usize = 32;
    pub const ORIGIN_SEQ: usize = 40;
    pub const ORIGIN_NODE: usize = 48;
    pub const UID: usize = 52;
    pub const GID: usize = 56;
    pub const KIND: usize = 60;
    pub const ZERO: usize = 61;
    pub const BODY: usize = 64;
}

const _: () = {
    assert!(segment_at::CRC + 4 == SEGMENT_HEADER_LEN && SEGMENT_HEADER_LEN.is_multiple_of(8));
    assert!(record_at::ZERO + 3 == HEADER_LEN && record_at::BODY == HEADER_LEN);
    assert!(HEADER_LEN.is_multiple_of(8) && TRAILER_LEN == 8 && BODY_LEN_MAX.is_multiple_of(8));
};

/// Kinds of records and their names, as they stand in the format and in a dump.
pub const KINDS: [(u8, &str); 13] = [
    (1, "noop"),
    (2, "create"),
    (3, "mkdir"),
    (4, "symlink"),
    (5, "mknod"),
    (6, "link"),
    (7, "rename"),
    (8, "unlink"),
    (9, "rmdir"),
    (10, "setattr"),
    (11, "setxattr"),
    (12, "removexattr"),
    (13, "store"),
];

/// The format's number of a change.
pub fn kind(op: &Op) -> u8 {
    match op {
        Op::Noop => 1,
        Op::Create { .. } => 2,
        Op::Mkdir { .. } => 3,
        Op::Symlink { .. } => 4,
        Op::Mknod { .. } => 5,
        Op::Link { .. } => 6,
        Op::Rename { .. } => 7,
        Op::Unlink { .. } => 8,
        Op::Rmdir { .. } => 9,
        Op::Setattr { .. } => 10,
        Op::Setxattr { .. } => 11,
        Op::Removexattr { .. } => 12,
        Op::Store { .. } => 13,
    }
}

/// The name of a change's kind.
pub fn kind_name(op: &Op) -> &'static str {
    KINDS[usize::from(kind(op)) - 1].1
}

/// What became of a record's intention. Its words differ in many bits, so that no single flip
/// turns one into another; a word that was zeroed reads as intended, and is redone harmlessly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// journaled; whether it happened is not known
    Intended,
    /// it happened
    Done,
    /// it failed and changed nothing
    Void,
}

impl Outcome {
    pub const ALL: [Outcome; 3] = [Outcome::Intended, Outcome::Done, Outcome::Void];

    pub fn word(self) -> u32 {
        match self {
            Outcome::Intended => 0,
            Outcome::Done => u32::from_le_bytes(*b"DONE"),
            Outcome::Void => u32::from_le_bytes(*b"VOID"),
        }
    }
    pub fn from_word(word: u32) -> Option<Outcome> {
        Outcome::ALL.into_iter().find(|outcome| outcome.word() == word)
    }
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Intended => "intended",
            Outcome::Done => "done",
            Outcome::Void => "void",
        }
    }
}

/// Why bytes are not what they should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    #[error("the bytes end before the record does")]
    Short,
    #[error("a length is beyond its bound")]
    TooLong,
    #[error("the length at the end disagrees")]
    Trailer,
    #[error("the sequence number is {found}")]
    Seq { found: u64 },
    #[error("it does not follow from the record before it")]
    Chain,
    #[error("the checksum is wrong")]
    Crc,
    #[error("the outcome word {0:#x} is unknown")]
    Outcome(u32),
    #[error("this is not a journal segment")]
    Magic,
    #[error("format version {0} is unknown (this imz knows {VERSION})")]
    Version(u32),
    #[error("record kind {0} is unknown")]
    Kind(u8),
    #[error("the field `{0}` is out of its range")]
    Field(&'static str),
    #[error("bytes are left over")]
    Trailing,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
fn put_at(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

// ---------------------------------------------------------------------------------------------
// segments

/// Header of a segment, 64 bytes.
///
/// ```text
///   at  len  field
///    0    8  magic        "imz-kml\n"
///    8    4  version      1
///   12    4  node         number of the node whose journal this is
///   16   16  incarnation  random; one life of one journal
///   32    8  first        seq of the segment's first record; all before it were durable
///   40    8  len          bytes of the segment, header included
///   48    4  seed         crc of the record before `first`, or of the incarnation
///   52    8  zero
///   60    4  crc          CRC-32 of bytes 0..60
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentHead {
    pub node: u32,
    pub incarnation: u128,
    pub first: Seq,
    pub len: u64,
    pub seed: u32,
}

impl SegmentHead {
    /// The seed of a journal's very first segment.
    pub fn first_seed(incarnation: u128) -> u32 {
        crc32fast::hash(&incarnation.to_le_bytes())
    }
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_LEN] {
        let mut out = [0; SEGMENT_HEADER_LEN];
        put_at(&mut out, segment_at::MAGIC, &SEGMENT_MAGIC);
        put_at(&mut out, segment_at::VERSION, &VERSION.to_le_bytes());
        put_at(&mut out, segment_at::NODE, &self.node.to_le_bytes());
        put_at(&mut out, segment_at::INCARNATION, &self.incarnation.to_le_bytes());
        put_at(&mut out, segment_at::FIRST, &self.first.0.to_le_bytes());
        put_at(&mut out, segment_at::LEN, &self.len.to_le_bytes());
        put_at(&mut out, segment_at::SEED, &self.seed.to_le_bytes());
        let crc = crc32fast::hash(&out[..segment_at::CRC]);
        put_at(&mut out, segment_at::CRC, &crc.to_le_bytes());
        out
    }
    /// # Errors
    /// The first of magic, version, crc and fields that is wrong.
    pub fn verify(bytes: &[u8]) -> Result<SegmentHead, Fault> {
        let head = bytes.get(..SEGMENT_HEADER_LEN).ok_or(Fault::Short)?;
        if head[..8] != SEGMENT_MAGIC {
            return Err(Fault::Magic);
        }
        let version = u32_at(head, segment_at::VERSION);
        if version != VERSION {
            return Err(Fault::Version(version));
        }
        if u32_at(head, segment_at::CRC) != crc32fast::hash(&head[..segment_at::CRC]) {
            return Err(Fault::Crc);
        }
        let mut incarnation = [0; 16];
        incarnation.copy_from_slice(&head[segment_at::INCARNATION..segment_at::FIRST]);
        let found = SegmentHead {
            node: u32_at(head, segment_at::NODE),
            incarnation: u128::from_le_bytes(incarnation),
            first: Seq(u64_at(head, segment_at::FIRST)),
            len: u64_at(head, segment_at::LEN),
            seed: u32_at(head, segment_at::SEED),
        };
        if found.node > NODE_MAX {
            return Err(Fault::Field("node"));
        }
        if found.first.0 == 0 || found.first.0 > SEQ_MAX {
            return Err(Fault::Field("first"));
        }
        if u64_at(head, segment_at::ZERO) != 0 {
            return Err(Fault::Field("zero"));
        }
        Ok(found)
    }
}

// ---------------------------------------------------------------------------------------------
// records

/// Largest seq: a journal that appends a million records a second gets there in 290,000 years.
pub const SEQ_MAX: u64 = i64::MAX as u64;

/// Length of the whole record with a body of `body_len` bytes.
pub const fn record_len(body_len: usize) -> usize {
    HEADER_LEN + body_len.next_multiple_of(8) + TRAILER_LEN
}

/// A record's bytes but for what its place in the journal gives it; see [`seal`].
///
/// # Errors
/// [`Fault::TooLong`] or [`Fault::Field`] for a record that no reader would take back.
pub fn draft(record: &Record) -> Result<Vec<u8>, Fault> {
    let mut out = Vec::with_capacity(512);
    out.resize(HEADER_LEN, 0);
    if record.origin.node > NODE_MAX || record.origin.seq.0 > SEQ_MAX {
        return Err(Fault::Field("origin"));
    }
    let mut body = Writer(&mut out);
    // a longer path keeps its end: it is there for people
    let cut = record.path.len().saturating_sub(PATH_LEN_MAX);
    body.bytes16(&record.path[cut..], PATH_LEN_MAX)?;
    body.op(&record.op)?;
    let body_len = out.len() - HEADER_LEN;
    if body_len > BODY_LEN_MAX {
        return Err(Fault::TooLong);
    }
    let len = record_len(body_len);
    out.resize(len, 0);
    put_at(&mut out, record_at::BODY_LEN, &(body_len as u32).to_le_bytes());
    put_at(&mut out, record_at::TIME_NS, &record.time_ns.to_le_bytes());
    put_at(&mut out, record_at::ORIGIN_SEQ, &record.origin.seq.0.to_le_bytes());
    put_at(&mut out, record_at::ORIGIN_NODE, &record.origin.node.to_le_bytes());
    put_at(&mut out, record_at::UID, &record.uid.to_le_bytes());
    put_at(&mut out, record_at::GID, &record.gid.to_le_bytes());
    out[record_at::KIND] = kind(&record.op);
    put_at(&mut out, len - TRAILER_LEN, &(len as u64).to_le_bytes());
    Ok(out)
}

/// Gives a draft its place in a journal; returns its crc, which chains the next record.
pub fn seal(draft: &mut [u8], seq: Seq, chain: u32, synced: Seq) -> u32 {
    put_at(draft, record_at::CHAIN, &chain.to_le_bytes());
    put_at(draft, record_at::SEQ, &seq.0.to_le_bytes());
    put_at(draft, record_at::SYNCED, &synced.0.to_le_bytes());
    let crc = crc32fast::hash(&draft[record_at::CHAIN..]);
    put_at(draft, record_at::CRC, &crc.to_le_bytes());
    crc
}

/// The bytes of one record in a journal.
///
/// # Errors
/// As [`draft`].
pub fn encode(record: &Record, seq: Seq, chain: u32) -> Result<Vec<u8>, Fault> {
    let mut out = draft(record)?;
    seal(&mut out, seq, chain, Seq(0));
    Ok(out)
}

/// The bytes of one record on the network: as in a journal, standing alone (its chain is 0).
///
/// # Errors
/// As [`draft`].
pub fn encode_wire(record: &Record, seq: Seq) -> Result<Vec<u8>, Fault> {
    encode(record, seq, 0)
}

/// Takes back what [`encode_wire`] made: exactly one record, and all of `bytes`.
///
/// # Errors
/// The first condition that does not hold; the bytes may be anything.
pub fn decode_wire(bytes: &[u8]) -> Result<(Seq, Record), Fault> {
    let suspect = Suspect(bytes);
    let seq = suspect.seq_claimed().ok_or(Fault::Short)?;
    let verified = suspect.verify(0, seq)?;
    if verified.bytes().len() != bytes.len() {
        return Err(Fault::Trailing);
    }
    if verified.outcome() != Outcome::Intended || verified.synced() != Seq(0) {
        return Err(Fault::Field("outcome"));
    }
    Ok((seq, verified.decode()?))
}

/// Length of the record whose header starts `head`, by its own claim: bounded, but not checked.
pub fn record_len_claimed(head: &[u8]) -> Result<usize, Fault> {
    let head = head.get(..HEADER_LEN).ok_or(Fault::Short)?;
    let body_len = u32_at(head, record_at::BODY_LEN) as usize;
    if body_len > BODY_LEN_MAX { Err(Fault::TooLong) } else { Ok(record_len(body_len)) }
}

/// Length of the record that ends with `trailer`, by its own claim: bounded, but not checked.
pub fn record_len_before(trailer: &[u8]) -> Result<usize, Fault> {
    let trailer = trailer.get(..TRAILER_LEN).ok_or(Fault::Short)?;
    let len = u64_at(trailer, 0);
    if len < RECORD_LEN_MIN as u64 || len > RECORD_LEN_MAX as u64 || !len.is_multiple_of(8) {
        return Err(Fault::Trailer);
    }
    Ok(len as usize)
}

/// Bytes that may be a record at their start, and anything behind it.
#[derive(Clone, Copy)]
pub struct Suspect<'a>(pub &'a [u8]);

/// One record of a journal, its place, and what became of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub seq: Seq,
    pub record: Record,
    pub outcome: Outcome,
}

/// The bytes of one record, whole and in its place.
#[derive(Clone, Copy)]
pub struct Verified<'a> {
    bytes: &'a [u8],
    outcome: Outcome,
}

impl<'a> Suspect<'a> {
    /// The seq that the bytes claim, if there are enough of them.
    pub fn seq_claimed(self) -> Option<Seq> {
        let head = self.0.get(..HEADER_LEN)?;
        Some(Seq(u64_at(head, record_at::SEQ)))
    }
    /// The chain that the bytes claim: for reading backwards and past damage, where the record
    /// before is not known (yet).
    pub fn chain_claimed(self) -> Option<u32> {
        let head = self.0.get(..HEADER_LEN)?;
        Some(u32_at(head, record_at::CHAIN))
    }
    /// Checks the conditions of the module's head, in order.
    ///
    /// # Errors
    /// The first condition that does not hold.
    pub fn verify(self, chain: u32, want: Seq) -> Result<Verified<'a>, Fault> {
        // 1, 2
        let len = record_len_claimed(self.0)?;
        let bytes = self.0.get(..len).ok_or(Fault::Short)?;
        // 3
        if u64_at(bytes, len - TRAILER_LEN) != len as u64 {
            return Err(Fault::Trailer);
        }
        // 4
        let found = u64_at(bytes, record_at::SEQ);
        if found != want.0 || found == 0 || found > SEQ_MAX {
            return Err(Fault::Seq { found });
        }
        // 5
        if u32_at(bytes, record_at::CHAIN) != chain {
            return Err(Fault::Chain);
        }
        // 6
        if u32_at(bytes, record_at::CRC) != crc32fast::hash(&bytes[record_at::CHAIN..]) {
            return Err(Fault::Crc);
        }
        // 7
        let word = u32_at(bytes, record_at::OUTCOME);
        let outcome = Outcome::from_word(word).ok_or(Fault::Outcome(word))?;
        Ok(Verified { bytes, outcome })
    }
}

impl<'a> Verified<'a> {
    pub fn bytes(self) -> &'a [u8] {
        self.bytes
    }
    pub fn seq(self) -> Seq {
        Seq(u64_at(self.bytes, record_at::SEQ))
    }
    /// Chains the next record.
    pub fn crc(self) -> u32 {
        u32_at(self.bytes, record_at::CRC)
    }
    pub fn outcome(self) -> Outcome {
        self.outcome
    }
    /// Newest seq that was durable when this record was appended.
    pub fn synced(self) -> Seq {
        Seq(u64_at(self.bytes, record_at::SYNCED))
    }
    /// # Errors
    /// [`Fault::Kind`] or [`Fault::Field`] for what this version does not know.
    pub fn decode(self) -> Result<Record, Fault> {
        let bytes = self.bytes;
        let body_len = u32_at(bytes, record_at::BODY_LEN) as usize;
        let body = &bytes[HEADER_LEN..HEADER_LEN + body_len];
        let padding = &bytes[HEADER_LEN + body_len..bytes.len() - TRAILER_LEN];
        let zero = &bytes[record_at::ZERO..HEADER_LEN];
        if zero.iter().chain(padding).any(|byte| *byte != 0) {
            return Err(Fault::Field("zero"));
        }
        let origin = Origin {
            node: u32_at(bytes, record_at::ORIGIN_NODE),
            seq: Seq(u64_at(bytes, record_at::ORIGIN_SEQ)),
        };
        if origin.node > NODE_MAX || origin.seq.0 > SEQ_MAX {
            return Err(Fault::Field("origin"));
        }
        let mut reader = Reader(body);
        let path = reader.bytes16(PATH_LEN_MAX)?.to_vec();
        let op = reader.op(bytes[record_at::KIND])?;
        if !reader.0.is_empty() {
            return Err(Fault::Trailing);
        }
        Ok(Record {
            time_ns: u64_at(bytes, record_at::TIME_NS),
            origin,
            uid: u32_at(bytes, record_at::UID),
            gid: u32_at(bytes, record_at::GID),
            path,
            op,
        })
    }
}

// ---------------------------------------------------------------------------------------------
// cursors

/// First bytes of a page of cursors.
pub const CURSORS_MAGIC: [u8; 8] = *b"imz-cur\n";
/// Bytes of a page of cursors: one sector, so that a power cut leaves it old or new.
pub const CURSORS_LEN: usize = 512;
/// Most cursors of one journal.
pub const CURSORS_MAX: usize = 16;
/// Longest name of a cursor, bytes.
pub const CURSOR_NAME_LEN_MAX: usize = 16;
const CURSOR_LEN: usize = CURSOR_NAME_LEN_MAX + 8;
const CURSORS_AT: usize = 32;
const CURSORS_CRC_AT: usize = CURSORS_LEN - 4;
const _: () = assert!(CURSORS_AT + CURSORS_MAX * CURSOR_LEN <= CURSORS_CRC_AT);

/// Named numbers kept beside the segments. Two pages alternate; the newer valid one counts.
///
/// ```text
///   at  len  field
///    0    8  magic       "imz-cur\n"
///    8    4  version     1
///   12    4  count       0..=16
///   16    8  generation  counts the writes
///   24    8  zero
///   32  384  cursors     16 times: name (16, filled up with zeros), value (8)
///  416   92  zero
///  508    4  crc         CRC-32 of bytes 0..508
/// ```
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct CursorPage {
    pub generation: u64,
    pub cursors: Vec<(Vec<u8>, u64)>,
}

impl CursorPage {
    /// # Errors
    /// [`Fault::TooLong`] or [`Fault::Field`] for more or longer cursors than fit.
    pub fn encode(&self) -> Result<[u8; CURSORS_LEN], Fault> {
        let mut out = [0; CURSORS_LEN];
        if self.cursors.len() > CURSORS_MAX {
            return Err(Fault::TooLong);
        }
        put_at(&mut out, 0, &CURSORS_MAGIC);
        put_at(&mut out, 8, &VERSION.to_le_bytes());
        put_at(&mut out, 12, &(self.cursors.len() as u32).to_le_bytes());
        put_at(&mut out, 16, &self.generation.to_le_bytes());
        for (slot, (name, value)) in self.cursors.iter().enumerate() {
            if name.is_empty() || name.len() > CURSOR_NAME_LEN_MAX || name.contains(&0) {
                return Err(Fault::Field("cursor name"));
            }
            let at = CURSORS_AT + slot * CURSOR_LEN;
            put_at(&mut out, at, name);
            put_at(&mut out, at + CURSOR_NAME_LEN_MAX, &value.to_le_bytes());
        }
        let crc = crc32fast::hash(&out[..CURSORS_CRC_AT]);
        put_at(&mut out, CURSORS_CRC_AT, &crc.to_le_bytes());
        Ok(out)
    }
    /// # Errors
    /// What is wrong with the page.
    pub fn verify(bytes: &[u8]) -> Result<CursorPage, Fault> {
        let page = bytes.get(..CURSORS_LEN).ok_or(Fault::Short)?;
        if page[..8] != CURSORS_MAGIC {
            return Err(Fault::Magic);
        }
        if u32_at(page, 8) != VERSION {
            return Err(Fault::Version(u32_at(page, 8)));
        }
        if u32_at(page, CURSORS_CRC_AT) != crc32fast::hash(&page[..CURSORS_CRC_AT]) {
            return Err(Fault::Crc);
        }
        let count = u32_at(page, 12) as usize;
        if count > CURSORS_MAX {
            return Err(Fault::TooLong);
        }
        let cursors = page[CURSORS_AT..].chunks_exact(CURSOR_LEN).take(count).map(|cursor| {
            let (name, value) = cursor.split_at(CURSOR_NAME_LEN_MAX);
            let len = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
            (name[..len].to_vec(), u64_at(value, 0))
        });
        Ok(CursorPage { generation: u64_at(page, 16), cursors: cursors.collect() })
    }
}

// ---------------------------------------------------------------------------------------------
// the table of writers

/// Slots of the table of open writers.
pub const WRITERS_MAX: usize = 65536;
/// The table's header: two words of 8 bytes, magic and version. The slots, fids, follow.
pub const WRITERS_HEADER: [u64; 2] = [u64::from_le_bytes(*b"imz-wri\n"), VERSION as u64];

mod body;
#[cfg(test)]
mod tests;
