//! A connection: messages in and out of one non-blocking stream.
//!
//! Two lanes go out: what somebody waits for overtakes what is shipped in the background, between
//! frames. Both lanes are bounded: [`Conn::has_room`] tells the owner to hold back, and a peer that
//! asks without reading the answers is not read any further, so it fills its own buffers. A message
//! whose number is not known is answered by `Failed` and does no harm; anything else that cannot
//! be understood is a [`Fault`], and the connection is closed.
//! Absent on purpose: the meaning of messages (lento), encryption (its place is between `stream`
//! and the decoder, and nobody above will notice).

use std::collections::VecDeque;
use std::io::{self, Read, Write};

use super::frame::{self, Decoder, Frame};
use super::poll::Stream;
use crate::lento::message::{Code, Failed, Garbled, Message};

/// A lane that holds so much has no room, bytes. One message may go beyond it.
pub const LANE_LEN_MAX: usize = 8 << 20;
/// Most bytes that one turn reads, so that one peer does not keep the others waiting.
const TURN_LEN_MAX: usize = 4 << 20;
/// Most bytes of one read from the kernel. Most turns bring one small message: the first read of
/// a turn takes less, from the stack.
const CHUNK_LEN: usize = 64 << 10;
const FIRST_LEN: usize = 2 << 10;

/// What overtakes what on the way out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lane {
    /// somebody waits for it
    Foreground = 0,
    /// shipping and backfetches
    Background = 1,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("the peer closed the connection")]
    Closed,
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    #[error("the peer sent {0}")]
    Frame(#[from] frame::Fault),
    #[error("the peer sent garbage: {0}")]
    Garbled(#[from] Garbled),
}

/// A message that came in.
#[derive(Clone, PartialEq, Debug)]
pub struct Incoming {
    /// of the request; an answer repeats it
    pub id: u64,
    /// whether it answers a request of ours
    pub answer: bool,
    pub message: Message,
}

/// One peer.
pub struct Conn {
    stream: Stream,
    decoder: Decoder,
    /// what is being written, and how far it is; no lane may cut in
    head: Vec<u8>,
    head_at: usize,
    lanes: [VecDeque<Vec<u8>>; 2],
    lane_lens: [usize; 2],
    compress: bool,
    more: bool,
    ended: Option<Fault>,
    bytes_in: u64,
    bytes_out: u64,
}

impl Conn {
    /// `compress`: pack large bodies on the way out. Not worth it where [`Stream::is_local`].
    pub fn new(stream: Stream, compress: bool) -> Conn {
        Conn {
            stream,
            decoder: Decoder::default(),
            head: Vec::new(),
            head_at: 0,
            lanes: Default::default(),
            lane_lens: [0; 2],
            compress,
            more: true,
            ended: None,
            bytes_in: 0,
            bytes_out: 0,
        }
    }
    /// For registering in the loop, and for asking whether a connection stands by now.
    pub fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }
    /// Since the connection began, as they travelled.
    pub fn bytes_in(&self) -> u64 {
        self.bytes_in
    }
    /// Since the connection began, as they travelled.
    pub fn bytes_out(&self) -> u64 {
        self.bytes_out
    }
    /// Whether the lane takes more; [`Conn::flush`] makes room.
    pub fn has_room(&self, lane: Lane) -> bool {
        self.lane_lens[lane as usize] < LANE_LEN_MAX
    }
    /// Whether `read` has something to do although no event will say so: call it again soon.
    pub fn has_more(&self) -> bool {
        self.more && self.has_room(Lane::Foreground)
    }
    /// Whether everything that was sent is with the kernel.
    pub fn is_flushed(&self) -> bool {
        self.head.is_empty() && self.lanes.iter().all(VecDeque::is_empty)
    }

    /// Puts a message in a lane; `flush` sends it.
    ///
    /// # Errors
    /// `TooLong` when it passes the bound of a frame; then nothing was sent.
    pub fn send(
        &mut self,
        lane: Lane,
        id: u64,
        answer: bool,
        message: &Message,
    ) -> Result<(), frame::Fault> {
        let frame = Frame { op: message.op(), answer, id, body: message.encode() };
        let bytes = frame.encode(self.compress)?;
        self.lane_lens[lane as usize] += bytes.len();
        self.lanes[lane as usize].push_back(bytes);
        Ok(())
    }

    /// Writes until the kernel takes no more or all is gone.
    ///
    /// # Errors
    /// The connection has failed.
    pub fn flush(&mut self) -> Result<(), Fault> {
        loop {
            if self.head_at == self.head.len() {
                let next = (0..2).find_map(|lane| Some((lane, self.lanes[lane].pop_front()?)));
                self.head_at = 0;
                let Some((lane, head)) = next else {
                    self.head = Vec::new();
                    return Ok(());
                };
                self.lane_lens[lane] -= head.len();
                self.head = head;
            }
            match self.stream.write(&self.head[self.head_at..]) {
                Ok(0) => return Err(Fault::Closed),
                Ok(count) => {
                    self.head_at += count;
                    self.bytes_out += count as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The messages that have come, in order: all of them, or as many as one turn may bring (then
    /// [`Conn::has_more`]).
    ///
    /// # Errors
    /// The connection has ended; what came before was given out by earlier calls.
    pub fn read(&mut self) -> Result<Vec<Incoming>, Fault> {
        let mut out = Vec::new();
        if let Some(fault) = self.ended.take() {
            self.more = false;
            return Err(fault);
        }
        self.more = true;
        if let Err(fault) = self.read_turn(&mut out) {
            if out.is_empty() {
                self.more = false;
                return Err(fault);
            }
            self.ended = Some(fault);
        }
        Ok(out)
    }

    fn read_turn(&mut self, out: &mut Vec<Incoming>) -> Result<(), Fault> {
        let (mut first, mut large) = ([0; FIRST_LEN], Vec::new());
        let mut turn_len = 0;
        while turn_len < TURN_LEN_MAX && self.has_room(Lane::Foreground) {
            if turn_len >= FIRST_LEN && large.is_empty() {
                large.resize(CHUNK_LEN, 0);
            }
            let chunk = if large.is_empty() { &mut first[..] } else { &mut large[..] };
            let count = match self.stream.read(chunk) {
                Ok(0) => return Err(Fault::Closed),
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.more = false;
                    return Ok(());
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e.into()),
            };
            turn_len += count;
            self.bytes_in += count as u64;
            self.decoder.feed(&chunk[..count]);
            while let Some(frame) = self.decoder.poll()? {
                self.take(frame, out)?;
            }
        }
        Ok(())
    }

    fn take(&mut self, frame: Frame, out: &mut Vec<Incoming>) -> Result<(), Fault> {
        let Frame { op, answer, id, body } = frame;
        let message = match Message::decode(op, &body) {
            Ok(message) => message,
            Err(unknown @ Garbled::Unknown(_)) => {
                let failed = Failed { code: Code::Other, what: unknown.to_string() }.into();
                if answer {
                    failed
                } else {
                    self.send(Lane::Foreground, id, true, &failed)?;
                    return Ok(());
                }
            }
            Err(garbled) => return Err(garbled.into()),
        };
        out.push(Incoming { id, answer, message });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kml::record::Fid;
    use crate::lento::message::{Data, Ping, Stat};

    fn pair(compress: bool) -> (Conn, Conn) {
        let (a, b) = Stream::pair().unwrap();
        (Conn::new(a, compress), Conn::new(b, compress))
    }

    fn data(len: usize) -> Message {
        Data { at: 0, bytes: vec![1; len], size: 0, token: 0 }.into()
    }

    /// Moves bytes until `want` messages have come.
    fn pump(from: &mut Conn, to: &mut Conn, want: usize) -> Vec<Incoming> {
        let mut got = Vec::new();
        while got.len() < want {
            from.flush().unwrap();
            got.extend(to.read().unwrap());
        }
        got
    }

    #[test]
    fn messages_arrive_in_order_and_whole() {
        for compress in [false, true] {
            let (mut a, mut b) = pair(compress);
            for id in 0..20 {
                a.send(Lane::Background, id, id % 2 == 1, &data(id as usize * 40_000)).unwrap();
            }
            let got = pump(&mut a, &mut b, 20);
            for (id, incoming) in got.iter().enumerate() {
                let want =
                    Incoming { id: id as u64, answer: id % 2 == 1, message: data(id * 40_000) };
                assert_eq!(*incoming, want);
            }
            assert_eq!(a.bytes_out(), b.bytes_in());
            assert_eq!(compress, a.bytes_out() < 100_000, "{}", a.bytes_out());
            assert!(a.is_flushed());
        }
    }

    #[test]
    fn the_foreground_overtakes_between_frames() {
        let (mut a, mut b) = pair(false);
        for id in 0..4 {
            a.send(Lane::Background, id, false, &data(1 << 20)).unwrap();
        }
        a.flush().unwrap();
        a.send(Lane::Foreground, 9, false, &Ping {}.into()).unwrap();
        let ids: Vec<u64> = pump(&mut a, &mut b, 5).iter().map(|i| i.id).collect();
        assert_eq!(ids, [0, 9, 1, 2, 3]);
    }

    #[test]
    fn a_full_lane_says_so_and_stops_the_reading() {
        let (mut a, mut b) = pair(false);
        let mut sent = 0;
        while b.has_room(Lane::Foreground) {
            b.send(Lane::Foreground, sent, true, &data(1 << 20)).unwrap();
            sent += 1;
        }
        assert!(sent <= 9);
        assert!(b.has_room(Lane::Background));
        a.send(Lane::Foreground, 1, false, &Ping {}.into()).unwrap();
        a.flush().unwrap();
        assert_eq!(b.read().unwrap(), []);
        assert!(!b.has_more());
        pump(&mut b, &mut a, sent as usize);
        assert!(b.has_more());
        assert_eq!(b.read().unwrap().len(), 1);
    }

    #[test]
    fn an_unknown_message_is_answered_and_passed_over() {
        let (mut a, mut b) = pair(false);
        let strange = Frame { op: 999, answer: false, id: 5, body: vec![1, 2, 3] };
        a.lanes[0].push_back(strange.encode(false).unwrap());
        a.lane_lens[0] += 27;
        a.send(
            Lane::Foreground,
            6,
            false,
            &Stat { fid: Fid(1), have: crate::kml::record::Stamp(0) }.into(),
        )
        .unwrap();
        assert_eq!(pump(&mut a, &mut b, 1)[0].id, 6);
        let answer = pump(&mut b, &mut a, 1);
        assert!(matches!(answer[0], Incoming { id: 5, answer: true, message: Message::Failed(_) }));
    }

    #[test]
    fn garbage_ends_it_after_what_was_whole() {
        let (mut a, mut b) = pair(false);
        a.send(Lane::Foreground, 1, false, &Ping {}.into()).unwrap();
        a.flush().unwrap();
        a.stream().write_all(&[0xff; 64]).unwrap();
        assert_eq!(b.read().unwrap().len(), 1);
        assert!(b.has_more());
        assert!(matches!(b.read(), Err(Fault::Frame(frame::Fault::TooLong(_)))));
    }

    #[test]
    fn a_peer_that_left_is_closed() {
        let (mut a, mut b) = pair(false);
        a.send(Lane::Foreground, 1, false, &Ping {}.into()).unwrap();
        a.flush().unwrap();
        drop(a);
        assert_eq!(b.read().unwrap().len(), 1);
        assert!(matches!(b.read(), Err(Fault::Closed)));
    }
}
