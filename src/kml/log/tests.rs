use std::sync::atomic::Ordering::Relaxed;

use super::*;
use crate::kml::record::Op;
use crate::kml::samples::{all, small};
use crate::kml::sim::{Rng, SimStore};

const SMALL: Options = Options { segment_len: 4096 };
const MAKE: Option<(u32, u128)> = Some((3, 77));

fn open(store: &SimStore) -> Result<Log, LogError> {
    Log::with_store(Box::new(store.clone()), MAKE, SMALL)
}

fn read(log: &Log) -> Vec<Entry> {
    log.entries(log.first()).collect::<Result<_, _>>().unwrap()
}

#[test]
fn what_was_appended_is_read_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { segment_len: SEGMENT_LEN_MIN };
    let log = Log::open_or_create(dir.path(), 3, 77, options).unwrap();
    assert_eq!((log.first(), log.last(), log.settled_through()), (Seq(1), Seq(0), Seq(0)));
    let records: Vec<Record> = (0..4).flat_map(|_| all()).chain((0..3000).map(small)).collect();
    for (nth, record) in records.iter().enumerate() {
        let ticket = log.append(record).unwrap();
        assert_eq!(ticket.seq, Seq(nth as u64 + 1));
        let outcome = if nth % 7 == 0 { Outcome::Void } else { Outcome::Done };
        log.settle(ticket, outcome);
    }
    assert!(log.bytes() > 3 * SEGMENT_LEN_MIN as u64);
    let check = |log: &Log| {
        let forth = read(log);
        assert_eq!(forth.len(), records.len());
        for (nth, (entry, record)) in forth.iter().zip(&records).enumerate() {
            assert_eq!((entry.seq, &entry.record), (Seq(nth as u64 + 1), record));
            let outcome = if nth % 7 == 0 { Outcome::Void } else { Outcome::Done };
            assert_eq!(entry.outcome, outcome);
        }
        let mut back: Vec<Entry> = log.entries_back(log.last()).map(Result::unwrap).collect();
        back.reverse();
        assert_eq!(back, forth);
        for seq in [1, 2, 63, 64, 65, 1000, records.len() as u64] {
            assert_eq!(log.get(Seq(seq)).unwrap(), forth[seq as usize - 1]);
            let first = log.entries_back(Seq(seq)).next().unwrap().unwrap();
            assert_eq!(first, forth[seq as usize - 1]);
        }
        assert_eq!(log.settled_through(), log.last());
        assert!(log.unsettled().unwrap().is_empty());
        assert!(matches!(log.get(log.last().next()), Err(LogError::NotKept { .. })));
    };
    check(&log);
    assert!(matches!(Log::open(dir.path()), Err(LogError::Locked { .. })));
    log.sync(log.last()).unwrap();
    drop(log);
    let log = Log::open(dir.path()).unwrap();
    assert_eq!((log.node(), log.incarnation()), (3, 77));
    check(&log);
    drop(log);
    assert!(matches!(
        Log::open_or_create(dir.path(), 4, 1, options),
        Err(LogError::OtherNode { found: 3, wanted: 4, .. })
    ));
}

#[test]
fn a_directory_without_a_journal_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Log::open(dir.path()), Err(LogError::Missing { .. })));
    assert!(matches!(Log::open(&dir.path().join("x")), Err(LogError::Missing { .. })));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn unsettled_records_are_there_in_the_next_life() {
    let store = SimStore::default();
    let log = open(&store).unwrap();
    let tickets: Vec<Ticket> = (0..100).map(|n| log.append(&small(n)).unwrap()).collect();
    for ticket in tickets {
        if ![10, 11, 50].contains(&ticket.seq.0) {
            log.settle(ticket, Outcome::Done);
        }
    }
    assert_eq!(log.settled_through(), Seq(9));
    std::mem::forget(log);
    let log = open(&store.killed()).unwrap();
    let found: Vec<u64> = log.unsettled().unwrap().iter().map(|entry| entry.seq.0).collect();
    assert_eq!(found, [10, 11, 50]);
    assert_eq!(log.settled_through(), Seq(9));
    log.settle_seq(Seq(11), Outcome::Void).unwrap();
    log.settle_seq(Seq(10), Outcome::Done).unwrap();
    assert_eq!(log.settled_through(), Seq(49));
    log.settle_seq(Seq(50), Outcome::Done).unwrap();
    assert_eq!(log.settled_through(), Seq(100));
    assert_eq!(log.get(Seq(11)).unwrap().outcome, Outcome::Void);
}

#[test]
fn trim_frees_whole_settled_segments_and_never_the_newest() {
    let store = SimStore::default();
    let log = open(&store).unwrap();
    for n in 0..200 {
        let ticket = log.append(&small(n)).unwrap();
        if n != 150 {
            log.settle(ticket, Outcome::Done);
        }
    }
    let before = log.bytes();
    log.trim(Seq(100)).unwrap();
    assert!(log.first() > Seq(60) && log.first() <= Seq(101), "{:?}", log.first());
    assert!(log.bytes() < before);
    log.trim(Seq(200)).unwrap();
    assert!(log.first() <= Seq(151) && log.first() > Seq(120), "an unsettled record stays");
    log.settle_seq(Seq(151), Outcome::Done).unwrap();
    log.sync(Seq(200)).unwrap();
    log.trim(Seq(1000)).unwrap();
    assert_eq!(log.bytes(), 4096);
    assert!(matches!(log.get(Seq(1)), Err(LogError::NotKept { .. })));
    let (first, last) = (log.first(), log.last());
    drop(log);
    let log = open(&store.killed()).unwrap();
    assert_eq!((log.first(), log.last()), (first, last));
    assert_eq!(log.append(&small(1)).unwrap().seq, Seq(201));
}

#[test]
fn cursors_outlive_crashes() {
    for seed in 0..50 {
        let mut rng = Rng::new(seed);
        let mut store = SimStore::default();
        let mut promised = 0;
        for life in 0..5 {
            let log = open(&store).unwrap();
            assert_eq!(log.cursor("acked"), promised, "seed {seed} life {life}");
            for _ in 0..rng.below(4) {
                promised += 1;
                log.set_cursor("acked", promised).unwrap();
                log.append(&small(promised)).unwrap();
                log.sync(log.last()).unwrap();
            }
            std::mem::forget(log);
            store = store.crash(&mut rng);
        }
    }
    let log = open(&SimStore::default()).unwrap();
    for bad in ["", "seventeen letters", SYNCED, SETTLED] {
        assert!(matches!(log.set_cursor(bad, 1), Err(LogError::Cursor { .. })), "{bad}");
    }
    for n in 0..14 {
        log.set_cursor(&format!("cursor {n}"), n).unwrap();
    }
    assert!(matches!(log.set_cursor("one more", 1), Err(LogError::Cursor { .. })));
    assert_eq!(log.cursor("cursor 13"), 13);
}

#[test]
fn a_failed_sync_is_final() {
    for by_cursor in [false, true] {
        let store = SimStore::default();
        let log = open(&store).unwrap();
        let ticket = log.append(&small(1)).unwrap();
        if by_cursor {
            log.set_cursor("a", 7).unwrap();
        }
        store.faults().sync_fails.store(true, Relaxed);
        let failed = if by_cursor { log.set_cursor("a", 8) } else { log.sync(ticket.seq) };
        assert!(matches!(failed, Err(LogError::Io { .. })));
        store.faults().sync_fails.store(false, Relaxed);
        assert!(log.is_poisoned());
        assert!(matches!(log.append(&small(2)), Err(LogError::Poisoned)));
        assert!(matches!(log.sync(ticket.seq), Err(LogError::Poisoned)));
        assert!(matches!(log.set_cursor("a", 1), Err(LogError::Poisoned)));
        // what is there can still be read
        assert_eq!(read(&log).len(), 1);
        // and the cursor page that failed was not the last good one
        std::mem::forget(log);
        assert_eq!(open(&store.killed()).unwrap().cursor("a"), if by_cursor { 7 } else { 0 });
    }
}

#[test]
fn a_full_disk_is_an_error_and_passes() {
    let store = SimStore::default();
    let log = open(&store).unwrap();
    store.faults().disk_full.store(true, Relaxed);
    let mut count = 0;
    let failed = loop {
        match log.append(&small(count)) {
            Ok(_) => count += 1,
            Err(why) => break why,
        }
    };
    assert!(matches!(failed, LogError::NoRoom(_)), "{failed}");
    assert_eq!(read(&log).len() as u64, count);
    store.faults().disk_full.store(false, Relaxed);
    assert_eq!(log.append(&small(count)).unwrap().seq, Seq(count + 1));
    assert_eq!(read(&log).len() as u64, count + 1);
}

#[test]
fn a_record_that_cannot_be_read_back_is_not_written() {
    let log = open(&SimStore::default()).unwrap();
    let mut bad = small(1);
    bad.op = Op::Symlink {
        at: crate::kml::samples::place(1, b"a"),
        fid: crate::kml::record::Fid(2),
        target: vec![],
    };
    assert!(matches!(log.append(&bad), Err(LogError::Unwritable(Fault::Field("target")))));
    // longer than this test's segments
    let long = all().into_iter().find(|r| matches!(r.op, Op::Symlink { .. })).unwrap();
    assert!(matches!(log.append(&long), Err(LogError::Unwritable(Fault::TooLong))));
    assert_eq!(log.append(&small(1)).unwrap().seq, Seq(1));
}

/// Several lives of one disk. What was promised is there; what is there was written, in order,
/// and nothing that was once cut comes back. `lossy`: recovery's zeros never reach the disk, so
/// that only the chain stands between the log and its ghosts.
fn lives(seed: u64, lossy: bool) {
    let mut rng = Rng::new(seed);
    let mut store = SimStore::default();
    store.faults().cuts_are_lost.store(lossy, Relaxed);
    let mut model: Vec<Record> = Vec::new();
    // a killed process loses nothing; a power cut loses nothing that was promised
    let (mut promised, mut kept, mut stamp) = (0, 0, 0);
    for life in 0..6 {
        let log = open(&store).unwrap_or_else(|why| panic!("seed {seed} life {life}: {why}"));
        let found: Vec<Record> = read(&log).into_iter().map(|entry| entry.record).collect();
        assert!(found.len() >= kept, "seed {seed} life {life}: lost");
        assert!(model.starts_with(&found), "seed {seed} life {life}: ghost");
        assert_eq!(log.last().0, found.len() as u64);
        assert!(log.synced().0 <= found.len() as u64, "seed {seed} life {life}: mark");
        model = found;
        for _ in 0..rng.below(40) {
            stamp += 1;
            // few lengths, so that stale records stand where new ones end
            let record = Record { path: vec![b'p'; (stamp % 2) as usize * 80], ..small(stamp) };
            let ticket = log.append(&record).unwrap();
            model.push(record);
            if rng.coin() {
                log.settle(ticket, Outcome::Done);
            }
            if rng.below(8) == 0 {
                log.sync(log.last()).unwrap();
                promised = model.len();
            }
        }
        promised = promised.max(store_promised(&store));
        if rng.below(4) == 0 {
            drop(log);
        } else {
            std::mem::forget(log);
        }
        if rng.below(4) == 0 {
            store = store.killed();
            kept = model.len();
        } else {
            store = store.crash(&mut rng);
            kept = promised;
        }
    }
}

/// Extending makes all that came before durable: that is a promise, too.
fn store_promised(store: &SimStore) -> usize {
    store.list().unwrap().last().map_or(0, |first| first.0 as usize - 1)
}

#[test]
fn crashes_lose_no_promise_and_raise_no_ghost() {
    (0..400).for_each(|seed| lives(seed, false));
}

#[test]
fn what_was_cut_stays_dead_even_if_the_cut_is_lost() {
    (0..400).for_each(|seed| lives(seed, true));
}

#[test]
fn threads_share_a_log() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { segment_len: SEGMENT_LEN_MIN };
    let log = Log::open_or_create(dir.path(), 1, 5, options).unwrap();
    const EACH: u64 = 2000;
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let log = &log;
            scope.spawn(move || {
                for n in 0..EACH {
                    let ticket = log.append(&small(thread * EACH + n)).unwrap();
                    let seq = ticket.seq;
                    if n % 100 == 0 {
                        log.sync(seq).unwrap();
                        assert!(log.synced() >= seq);
                    }
                    log.settle(ticket, Outcome::Done);
                }
            });
        }
        // a reader beside the writers never sees half a record
        let mut reader = log.entries(Seq(1));
        let mut due = 1;
        while due <= 4 * EACH {
            if let Some(entry) = reader.next() {
                assert_eq!(entry.unwrap().seq, Seq(due));
                due += 1;
            }
        }
    });
    assert_eq!(log.settled_through(), Seq(4 * EACH));
    let mut seen: Vec<u64> = read(&log).iter().map(|entry| entry.record.time_ns).collect();
    for thread in 0..4 {
        let own = |n: &&u64| **n / EACH == thread;
        assert!(seen.iter().filter(own).is_sorted(), "each thread's order is kept");
    }
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..4 * EACH), "each record once");
}

/// Where each of the first segment's records begins.
fn starts(store: &SimStore) -> Vec<Spot> {
    let segment = store.open(Seq(1)).unwrap();
    let seed = SegmentHead::first_seed(77);
    let mut spot = Spot { at: SEGMENT_HEADER_LEN, seq: Seq(1), chain: seed };
    let (mut spots, mut buf) = (vec![spot], Vec::new());
    while recover::skip(&*segment, &mut spot, &mut buf).is_ok() {
        spots.push(spot);
    }
    spots
}

#[test]
fn a_later_record_proves_that_an_earlier_one_was_acknowledged() {
    let damaged = |nth: usize| {
        let store = SimStore::default();
        let log = open(&store).unwrap();
        let old = store.cursors().unwrap().unwrap();
        (0..5).for_each(|n| drop(log.append(&small(n)).unwrap()));
        log.sync(Seq(5)).unwrap();
        (5..8).for_each(|n| drop(log.append(&small(n)).unwrap()));
        std::mem::forget(log);
        // the cursors of before: only the records know
        store.put_cursors(0, &old[0], true).unwrap();
        store.put_cursors(1, &old[1], true).unwrap();
        let at = starts(&store)[nth - 1].at;
        store.open(Seq(1)).unwrap().set_word(at + record_at::TIME_NS, 0xbad);
        open(&store.killed())
    };
    for nth in 1..=5 {
        let why = damaged(nth).err().expect("refused");
        let seq = Seq(nth as u64);
        assert!(matches!(why, LogError::Corrupt { seq: s, why: Fault::Crc, .. } if s == seq));
    }
    // nobody was promised these
    for nth in 6..=8 {
        assert_eq!(damaged(nth).unwrap().last(), Seq(nth as u64 - 1));
    }
}

#[test]
fn a_newer_version_s_record_is_refused_and_not_cut() {
    let store = SimStore::default();
    let log = open(&store).unwrap();
    log.append(&small(1)).unwrap();
    drop(log);
    let spot = *starts(&store).last().unwrap();
    let mut bytes = codec::draft(&small(2)).unwrap();
    bytes[record_at::KIND] = 200;
    codec::seal(&mut bytes, spot.seq, spot.chain, Seq(0));
    let segment = store.open(Seq(1)).unwrap();
    segment.put(spot.at, &bytes);
    for _ in 0..2 {
        let why = open(&store.killed()).err().expect("refused");
        assert!(matches!(why, LogError::Corrupt { why: Fault::Kind(200), seq: Seq(2), .. }));
    }
    assert_eq!(segment.word(spot.at + record_at::SEQ), 2, "left as it was");
}

#[test]
fn a_torn_tail_is_zeroed() {
    let store = SimStore::default();
    let log = open(&store).unwrap();
    (0..3).for_each(|n| drop(log.append(&small(n)).unwrap()));
    std::mem::forget(log);
    let at = starts(&store)[1].at;
    let segment = store.open(Seq(1)).unwrap();
    segment.set_word(at + record_at::TIME_NS, 0xbad);
    assert_eq!(open(&store.killed()).unwrap().last(), Seq(1));
    assert_eq!(recover::data_end(&*segment, at), at);
}

#[test]
fn a_record_put_in_another_s_place_is_seen_from_behind() {
    let store = SimStore::default();
    let log = open(&store).unwrap();
    (0..3).for_each(|n| drop(log.append(&small(n)).unwrap()));
    let spot = starts(&store)[1];
    let mut forged = small(1);
    forged.uid = 4321;
    let bytes = codec::encode(&forged, spot.seq, spot.chain).unwrap();
    let mut back = log.entries_back(Seq(3));
    assert_eq!(back.next().unwrap().unwrap().seq, Seq(3));
    store.open(Seq(1)).unwrap().put(spot.at, &bytes);
    let why = back.next().unwrap();
    assert!(matches!(why, Err(LogError::Corrupt { seq: Seq(2), why: Fault::Chain, .. })));
    assert!(back.next().is_none());
}
