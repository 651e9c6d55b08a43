use proptest::prelude::*;

use super::*;
use crate::kml::record::{Change, Fid, Range, Stamp, Time};
use crate::kml::samples::{all, place, record, small};

#[test]
fn every_kind_comes_back_as_it_went() {
    for record in all() {
        let bytes = encode(&record, Seq(9), 0xabcd).unwrap();
        assert_eq!(bytes.len() % 8, 0);
        let verified = Suspect(&bytes).verify(0xabcd, Seq(9)).unwrap();
        assert_eq!(verified.outcome(), Outcome::Intended);
        assert_eq!(verified.decode().unwrap(), record);
        assert_eq!(record_len_claimed(&bytes), Ok(bytes.len()));
        assert_eq!(record_len_before(&bytes[bytes.len() - 8..]), Ok(bytes.len()));
        let wire = encode_wire(&record, Seq(9)).unwrap();
        assert_eq!(decode_wire(&wire).unwrap(), (Seq(9), record));
    }
    let kinds: std::collections::BTreeSet<u8> = all().iter().map(|r| kind(&r.op)).collect();
    assert!(kinds.into_iter().eq(KINDS.map(|(kind, _)| kind)), "a sample of every kind");
}

/// Each condition by itself: the bytes are right but for it.
#[test]
fn each_condition_is_checked() {
    let bytes = encode(&small(1), Seq(9), 5).unwrap();
    let verify = |bytes: &[u8], chain, seq| Suspect(bytes).verify(chain, Seq(seq)).err();
    let with = |at: usize, value: &[u8]| {
        let mut bytes = bytes.clone();
        put_at(&mut bytes, at, value);
        verify(&bytes, 5, 9)
    };
    let end = bytes.len() - TRAILER_LEN;
    assert_eq!(verify(&bytes, 5, 9), None);
    assert_eq!(verify(&bytes[..HEADER_LEN - 1], 5, 9), Some(Fault::Short));
    assert_eq!(with(record_at::BODY_LEN, &u32::MAX.to_le_bytes()), Some(Fault::TooLong));
    assert_eq!(verify(&bytes[..end], 5, 9), Some(Fault::Short));
    assert_eq!(with(end, &1u64.to_le_bytes()), Some(Fault::Trailer));
    assert_eq!(verify(&bytes, 5, 8), Some(Fault::Seq { found: 9 }));
    assert_eq!(verify(&bytes, 6, 9), Some(Fault::Chain));
    assert_eq!(with(record_at::TIME_NS, &[0xff]), Some(Fault::Crc));
    assert_eq!(with(record_at::OUTCOME, &[1]), Some(Fault::Outcome(1)));
    for outcome in Outcome::ALL {
        assert_eq!(with(record_at::OUTCOME, &outcome.word().to_le_bytes()), None);
    }
}

/// Bytes that pass as a record but hold what this version does not know.
#[test]
fn an_intact_stranger_is_told_from_damage() {
    let forge = |at: usize, value: &[u8]| {
        let mut bytes = draft(&small(1)).unwrap();
        put_at(&mut bytes, at, value);
        seal(&mut bytes, Seq(1), 0, Seq(0));
        Suspect(&bytes).verify(0, Seq(1)).unwrap().decode().err()
    };
    assert_eq!(forge(record_at::KIND, &[14]), Some(Fault::Kind(14)));
    assert_eq!(forge(record_at::ZERO, &[1]), Some(Fault::Field("zero")));
    assert_eq!(forge(record_at::ORIGIN_NODE, &[0xff; 4]), Some(Fault::Field("origin")));
    // the path's length, then the directory's fid behind it
    assert_eq!(forge(record_at::BODY, &[0xff, 0xff]), Some(Fault::TooLong));
    assert_eq!(forge(record_at::BODY + 3, &[0; 8]), Some(Fault::Field("fid")));
    assert_eq!(forge(record_at::KIND, &[8]), Some(Fault::Short));
    assert_eq!(forge(record_at::KIND, &[1]), Some(Fault::Trailing));
}

#[test]
fn what_cannot_be_read_is_not_written() {
    let fid = Fid(2);
    let base = Stamp(0);
    let name = b"user.a".to_vec();
    let range = |at, len| Op::Store {
        fid,
        base,
        size: 0,
        mtime: Time::default(),
        ranges: vec![Range { at, len }],
        old_size: 0,
    };
    let time = Some(Time { sec: 0, nsec: 1_000_000_000 });
    let late = Change { atime: time, ..Change::default() };
    let cases = [
        (Op::Link { at: place(1, b"a"), fid: Fid(0), base }, Fault::Field("fid")),
        (Op::Symlink { at: place(1, b"a"), fid, target: vec![1; 4096] }, Fault::TooLong),
        (Op::Symlink { at: place(1, b"a"), fid, target: vec![0] }, Fault::Field("target")),
        (
            Op::Setxattr { fid, base, name, value: vec![0; XATTR_LEN_MAX + 1], old: None },
            Fault::TooLong,
        ),
        (Op::Removexattr { fid, base, name: vec![], old: None }, Fault::Field("xattr name")),
        (range(u64::MAX, 2), Fault::Field("range")),
        (range(1 << 62, 1 << 62), Fault::Field("range")),
        (Op::Setattr { fid, base, new: late, old: Change::default() }, Fault::Field("nsec")),
    ];
    for (op, fault) in cases {
        assert_eq!(encode(&record(op), Seq(1), 0), Err(fault));
    }
    let mut long = small(1);
    long.path = [vec![b'x'; 10], vec![b'y'; PATH_LEN_MAX]].concat();
    let back = decode_wire(&encode_wire(&long, Seq(1)).unwrap()).unwrap().1;
    assert_eq!(back.path, vec![b'y'; PATH_LEN_MAX], "a long path keeps its end");
}

#[test]
fn heads_and_cursors_come_back_or_are_refused() {
    let head = SegmentHead { node: 7, incarnation: 1 << 100, first: Seq(12), len: 4096, seed: 99 };
    let bytes = head.encode();
    assert_eq!(SegmentHead::verify(&bytes), Ok(head));
    let page = CursorPage { generation: 4, cursors: vec![(b"sixteen letters!".to_vec(), 5)] };
    let cursors = page.encode().unwrap();
    assert_eq!(CursorPage::verify(&cursors), Ok(page));
    for at in 0..SEGMENT_HEADER_LEN {
        let mut bad = bytes;
        bad[at] ^= 16;
        assert!(SegmentHead::verify(&bad).is_err(), "byte {at}");
    }
    for at in 0..CURSORS_LEN {
        let mut bad = cursors;
        bad[at] ^= 16;
        assert!(CursorPage::verify(&bad).is_err(), "byte {at}");
    }
    let mut newer = bytes;
    newer[segment_at::VERSION] = 2;
    assert_eq!(SegmentHead::verify(&newer), Err(Fault::Version(2)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    /// Any flip anywhere is seen, and anything at all may be decoded without a panic.
    #[test]
    fn no_flip_goes_unseen(nth in 0usize..19, at in any::<usize>(), bit in 0u8..8) {
        let record = &all()[nth];
        let mut bytes = encode_wire(record, Seq(3)).unwrap();
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        prop_assert!(decode_wire(&bytes).is_err());
    }

    /// Bodies of any bytes under a right checksum: no panic, and what decodes encodes to itself.
    #[test]
    fn any_body_is_borne(kind in 0u8..16, body in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = draft(&record(Op::Noop)).unwrap();
        bytes.truncate(HEADER_LEN);
        bytes.extend(&body);
        let len = record_len(body.len());
        bytes.resize(len, 0);
        put_at(&mut bytes, len - TRAILER_LEN, &(len as u64).to_le_bytes());
        put_at(&mut bytes, record_at::BODY_LEN, &(body.len() as u32).to_le_bytes());
        bytes[record_at::KIND] = kind;
        seal(&mut bytes, Seq(1), 0, Seq(0));
        if let Ok((seq, found)) = decode_wire(&bytes) {
            prop_assert_eq!(encode_wire(&found, seq).unwrap(), bytes);
        }
    }

    /// The same, but mostly right: one of the samples with one byte of its body changed.
    #[test]
    fn a_changed_body_is_borne(nth in 0usize..19, at in 0usize..300, byte in any::<u8>()) {
        let mut bytes = draft(&all()[nth]).unwrap();
        let body = bytes.len() - RECORD_LEN_MIN;
        bytes[HEADER_LEN + at % body.max(1)] = byte;
        seal(&mut bytes, Seq(1), 0, Seq(0));
        if let Ok((seq, found)) = decode_wire(&bytes) {
            prop_assert_eq!(encode_wire(&found, seq).unwrap(), bytes);
        }
    }
}
