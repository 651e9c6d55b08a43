//! Bytes that nobody meant: mutated journals, frames, messages, records, and hostile journals that
//! are replayed onto a tree beside which another must stay as it is.
//!
//! Every input must give a value or a named error: no panic (so no overflow, in this build), no
//! single allocation beyond `ALLOC_MAX`, no hang. Inputs are seeds that were changed: bits flipped,
//! lengths and fields set to values of a dictionary, parts cut, copied and spliced. Then checksums
//! are put right again, most of the time, so that what lies behind them is reached; an input that
//! was read well becomes a seed.
//!
//! `cargo test --test fuzz` runs each for a few seconds, from the same numbers every time.
//! `IMZ_FUZZ_SECONDS=600` runs each for ten minutes, `IMZ_FUZZ_SEED=7` from another number. What is
//! found is printed as hex: keep it as a file in `tests/fuzz/corpus/NAME/`, and it is tried first from
//! then on. Idea and mutations: AFL, libFuzzer; neither works on stable.

#![allow(clippy::unwrap_used)] // in tests it is the message

#[path = "fuzz/engine.rs"]
mod engine;
#[path = "fuzz/records.rs"]
mod records;

use std::fs;
use std::path::{Path, PathBuf};

use engine::{Rng, Target, fuzz};
use imz::kml::codec::{self, Entry, HEADER_LEN, Outcome, SegmentHead, Suspect, record_at};
use imz::kml::dump::{Dump, Options, render};
use imz::kml::log::{Log, Options as LogOptions, SEGMENT_LEN_MIN};
use imz::kml::record::Seq;
use imz::kml::store::segment_name;
use imz::lento::message::{BODY_LEN_MAX, Message};
use imz::net::frame::{Decoder, Frame, HEADER};

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// Sets seq, chain, length at the end and crc of each record in a row, as far as lengths lead.
fn repair_records(bytes: &mut [u8], mut at: usize, first: u64, mut chain: Option<u32>) {
    let mut seq = first;
    while let Some(rest) = bytes.get_mut(at..)
        && let Ok(len) = codec::record_len_claimed(rest)
        && let Some(record) = rest.get_mut(..len)
    {
        if record[record_at::KIND] == 0 {
            return; // nothing was written from here on
        }
        put(record, len - 8, &(len as u64).to_le_bytes());
        put(record, record_at::SEQ, &seq.to_le_bytes());
        put(record, record_at::CHAIN, &chain.unwrap_or(0).to_le_bytes());
        let crc = crc32fast::hash(&record[record_at::CHAIN..]);
        put(record, record_at::CRC, &crc.to_le_bytes());
        chain = chain.map(|_| crc);
        (seq, at) = (seq + 1, at + len);
    }
}

// ---- the journal ---------------------------------------------------------------------------

/// Bytes of a segment; zeros behind them are left out.
struct Journal {
    dir: tempfile::TempDir,
}

const SEGMENT: usize = codec::SEGMENT_HEADER_LEN;

impl Journal {
    fn new() -> Journal {
        Journal { dir: engine::scratch() }
    }
}

impl Target for Journal {
    fn name(&self) -> &'static str {
        "journal"
    }
    fn seeds(&self, rng: &mut Rng) -> Vec<Vec<u8>> {
        let seed = |rng: &mut Rng, count: usize| {
            let dir = engine::scratch();
            let options = LogOptions { segment_len: SEGMENT_LEN_MIN };
            let log = Log::open_or_create(dir.path(), 0, 77, options).unwrap();
            for nth in 0..count {
                // some that its bounds refuse
                let Ok(ticket) = log.append(&records::any(rng)) else { continue };
                log.settle(ticket, Outcome::ALL[nth % 3]);
            }
            log.sync(log.last()).unwrap();
            let bytes = fs::read(dir.path().join(segment_name(Seq(1)))).unwrap();
            let end = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
            bytes[..end.next_multiple_of(8)].to_vec()
        };
        (0..24).map(|nth| seed(rng, nth)).collect()
    }
    fn repair(&self, bytes: &mut [u8]) {
        if bytes.len() >= SEGMENT {
            let crc = crc32fast::hash(&bytes[..codec::segment_at::CRC]);
            put(bytes, codec::segment_at::CRC, &crc.to_le_bytes());
        }
        if let Ok(head) = SegmentHead::verify(bytes) {
            repair_records(bytes, SEGMENT, head.first.0, Some(head.seed));
        }
    }
    fn run(&mut self, bytes: &[u8]) -> bool {
        let first = SegmentHead::verify(bytes).map_or(Seq(1), |head| head.first);
        let file = self.dir.path().join(segment_name(first));
        let mut whole = bytes.to_vec();
        // most without their zeros, which take long to look at
        let is_whole = bytes.last().is_some_and(|byte| byte % 4 == 0);
        if is_whole && whole.len() < SEGMENT_LEN_MIN {
            whole.resize(SEGMENT_LEN_MIN, 0);
        }
        fs::write(&file, &whole).unwrap();
        let mut count = 0;
        for path in [&file, self.dir.path()] {
            for reverse in [false, true] {
                let options = Options { reverse, still: true, ..Options::default() };
                let mut dump = Dump::open(path, options).unwrap();
                for entry in dump.by_ref() {
                    count += 1;
                    assert!(!render::line(&entry).contains('\n'));
                    assert!(render::json(&entry)["seq"].is_u64());
                }
                assert!(!dump.end().to_string().is_empty());
            }
        }
        // opening it cuts and settles: last, for it changes the file
        if is_whole && let Ok(log) = Log::open(self.dir.path()) {
            let forth = log.entries(log.first()).take_while(Result::is_ok).count();
            let back = log.entries_back(log.last()).take_while(Result::is_ok).count();
            assert_eq!(forth, back, "both directions");
        }
        for entry in fs::read_dir(self.dir.path()).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        count > 0
    }
}

// ---- records ---------------------------------------------------------------------------------

/// One record as it travels, or as it stands in a journal: the first byte chooses.
struct Wire;

impl Target for Wire {
    fn name(&self) -> &'static str {
        "record"
    }
    fn seeds(&self, rng: &mut Rng) -> Vec<Vec<u8>> {
        let encoded = |rng: &mut Rng| codec::encode_wire(&records::any(rng), Seq(9)).ok();
        (0..400).filter_map(|_| encoded(rng)).map(|it| [&[0][..], &it].concat()).collect()
    }
    fn repair(&self, bytes: &mut [u8]) {
        if bytes.len() > HEADER_LEN {
            // the body is what it is: its length is what there is
            let body_len = (bytes.len() - 1).saturating_sub(HEADER_LEN + 8);
            let claimed = codec::record_len_claimed(&bytes[1..]).unwrap_or(0);
            if claimed != bytes.len() - 1 {
                put(bytes, 1 + record_at::BODY_LEN, &(body_len as u32).to_le_bytes());
            }
            repair_records(&mut bytes[1..], 0, 9, None);
        }
    }
    fn run(&mut self, bytes: &[u8]) -> bool {
        let Some((how, bytes)) = bytes.split_first() else { return false };
        if *how % 2 == 0 {
            return match codec::decode_wire(bytes) {
                Ok((seq, record)) => {
                    let again = codec::encode_wire(&record, seq).unwrap();
                    assert_eq!(again, bytes, "each record has one encoding");
                    let entry = Entry { seq, record, outcome: Outcome::Done };
                    render::line(&entry);
                    render::json(&entry);
                    true
                }
                Err(why) => why.to_string().is_empty(), // each has words
            };
        }
        let suspect = Suspect(bytes);
        let (Some(seq), Some(chain)) = (suspect.seq_claimed(), suspect.chain_claimed()) else {
            return false;
        };
        match suspect.verify(chain, seq) {
            Ok(verified) => verified.decode().is_ok(),
            Err(why) => why.to_string().is_empty(),
        }
    }
}

// ---- frames and messages ---------------------------------------------------------------------

/// Bytes of a connection.
struct Frames;

impl Target for Frames {
    fn name(&self) -> &'static str {
        "frame"
    }
    fn seeds(&self, rng: &mut Rng) -> Vec<Vec<u8>> {
        let frame = |rng: &mut Rng, nth: usize| {
            let body = match nth % 3 {
                0 => rng.bytes(nth * 20),
                1 => vec![nth as u8; nth * 100],
                _ => records::cbor(rng, 3),
            };
            let frame =
                Frame { op: nth as u16, answer: nth.is_multiple_of(2), id: rng.next(), body };
            frame.encode(nth % 3 == 1).unwrap()
        };
        (0..60).map(|nth| [frame(rng, nth), frame(rng, nth + 1)].concat()).collect()
    }
    fn repair(&self, bytes: &mut [u8]) {
        let mut at = 0;
        while let Some(rest) = bytes.get_mut(at..).filter(|rest| rest.len() >= HEADER) {
            let len = u32::from_le_bytes(rest[..4].try_into().unwrap()) as usize;
            let Some(frame) = rest.get_mut(..HEADER.saturating_add(len)) else { return };
            let mut crc = crc32fast::Hasher::new();
            crc.update(&frame[..4]);
            crc.update(&frame[8..]);
            put(frame, 4, &crc.finalize().to_le_bytes());
            at += HEADER + len;
        }
    }
    fn run(&mut self, bytes: &[u8]) -> bool {
        let (mut decoder, mut read) = (Decoder::default(), false);
        let step = bytes.first().map_or(1, |byte| usize::from(*byte) + 1);
        for piece in bytes.chunks(step) {
            decoder.feed(piece);
            loop {
                match decoder.poll() {
                    Ok(Some(frame)) => {
                        assert!(frame.body.len() <= BODY_LEN_MAX);
                        let _ = Message::decode(frame.op, &frame.body); // its own target
                        read = true;
                    }
                    Ok(None) => break,
                    Err(why) => {
                        assert_eq!(decoder.poll(), Err(why), "a fault is said again");
                        return read;
                    }
                }
            }
        }
        read
    }
}

/// Number of a message (two bytes) and its body.
struct Messages;

/// The numbers that a message may have.
const OPS: u64 = 60;

impl Target for Messages {
    fn name(&self) -> &'static str {
        "message"
    }
    fn seeds(&self, rng: &mut Rng) -> Vec<Vec<u8>> {
        let mut seeds = Vec::new();
        for op in 0..OPS as u16 {
            // what happens to be read is what the rest is made from
            let mut bodies: Vec<_> = (0..3000).map(|_| records::cbor(rng, 4)).collect();
            bodies.retain(|body| Message::decode(op, body).is_ok());
            bodies.truncate(20);
            bodies.push(records::cbor(rng, 3));
            seeds.extend(bodies.iter().map(|body| [&op.to_le_bytes()[..], body].concat()));
        }
        seeds
    }
    fn repair(&self, _: &mut [u8]) {}
    fn run(&mut self, bytes: &[u8]) -> bool {
        let Some((op, body)) = bytes.split_first_chunk::<2>() else { return false };
        match Message::decode(u16::from_le_bytes(*op), body) {
            Ok(message) => {
                let again = Message::decode(message.op(), &message.encode());
                // not a number is never the same
                assert!(again.is_ok(), "{message:?}");
                assert!(!message.brief().is_empty());
                true
            }
            Err(why) => why.to_string().is_empty(),
        }
    }
}

// ---- replay ----------------------------------------------------------------------------------

#[path = "fuzz/hostile.rs"]
mod hostile;

#[test]
fn journals() {
    fuzz(&mut Journal::new());
}

#[test]
fn records() {
    fuzz(&mut Wire);
}

#[test]
fn frames() {
    fuzz(&mut Frames);
}

#[test]
fn messages() {
    fuzz(&mut Messages);
}

#[test]
fn replayed_journals_stay_in_their_tree() {
    fuzz(&mut hostile::Hostile::new());
}

/// The kept findings and seeds of a target.
fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    let mut kept = Vec::new();
    for entry in fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.unwrap().path();
        let text: String = fs::read_to_string(&path).unwrap().split_whitespace().collect();
        kept.push((path, engine::from_hex(&text)));
    }
    kept.sort();
    assert!(!kept.is_empty(), "{}: no seeds", dir.display());
    kept
}
