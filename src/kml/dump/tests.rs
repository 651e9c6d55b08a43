//! Dumps of journals that are whole, alive, or damaged in many ways.

use super::render::{json, line};
use super::*;
use crate::kml::codec::Outcome;
use crate::kml::log::{Log, LogError, Options as LogOptions, SEGMENT_LEN_MIN};
use crate::kml::record::{Op, Record};
use crate::kml::samples::{all, record, small};
use crate::kml::sim::Rng;

fn log(dir: &Path) -> Log {
    let options = LogOptions { segment_len: SEGMENT_LEN_MIN };
    Log::open_or_create(dir, 1, 9, options).unwrap()
}

fn dump(path: &Path, options: Options) -> (Vec<Entry>, End) {
    let mut dump = Dump::open(path, options).unwrap();
    let entries = dump.by_ref().collect();
    (entries, dump.end)
}

fn seqs(entries: &[Entry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.seq.0).collect()
}

#[test]
fn both_ways_over_segments_and_filtered() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path());
    let records: Vec<Record> = all().into_iter().chain((0..2500).map(small)).collect();
    for record in &records {
        let ticket = log.append(record).unwrap();
        log.settle(ticket, Outcome::Done);
    }
    let count = records.len() as u64;
    let (forth, end) = dump(dir.path(), Options::default());
    assert!(forth.iter().map(|entry| &entry.record).eq(&records));
    assert!(matches!(end.why, Why::Stop(Stop::End)), "{end}");
    assert_eq!(end.seq, Seq(count + 1));
    let (mut back, end) = dump(dir.path(), Options { reverse: true, ..Options::default() });
    assert!(!end.is_damage());
    back.reverse();
    assert_eq!(back, forth);
    let bounds = |from, to| Options { from: Some(from), to: Some(to), ..Options::default() };
    let (some, _) = dump(dir.path(), bounds(Bound::Seq(Seq(2000)), Bound::Seq(Seq(2003))));
    assert_eq!(seqs(&some), [2000, 2001, 2002, 2003]);
    let (some, _) = dump(dir.path(), bounds(Bound::TimeNs(1000), Bound::TimeNs(1002)));
    assert_eq!(some.iter().map(|e| e.record.time_ns).collect::<Vec<_>>(), [1000, 1001, 1002]);
    let below = |path: &[u8]| Options { path: Some(path.to_vec()), ..Options::default() };
    let (some, _) = dump(dir.path(), below(b"/some/"));
    assert_eq!(some.len(), all().len() - 2);
    assert!(dump(dir.path(), below(b"som")).0.is_empty());
    // one segment alone
    let first = segments_in(dir.path()).unwrap()[1];
    let (some, _) = dump(&dir.path().join(segment_name(first)), Options::default());
    assert_eq!(some[0].seq, first);
}

#[test]
fn a_live_journal_is_followed_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path());
    let mut follow = Dump::open(dir.path(), Options::default()).unwrap();
    let mut seen = 0;
    for n in 0..3000 {
        log.append(&small(n)).unwrap();
        if n % 97 == 0 {
            seen += follow.by_ref().count();
            assert_eq!(seen as u64, n + 1);
            assert!(!follow.end().is_final());
        }
    }
    assert!(segments_in(dir.path()).unwrap().len() > 1);
}

#[test]
fn lines_and_json_say_it_all() {
    for (nth, record) in all().into_iter().enumerate() {
        let entry = Entry { seq: Seq(nth as u64 + 1), record, outcome: Outcome::Done };
        let text = line(&entry);
        assert!(text.starts_with(&format!("{} 2023-11-14T22:13:20.123456789Z done ", nth + 1)));
        assert!(!text.contains('\n') && text.is_ascii(), "{text}");
        let value = json(&entry);
        assert_eq!(value["seq"], nth as u64 + 1);
        assert_eq!(value["outcome"], "done");
        assert!(!value.to_string().contains('\n'));
    }
    let mut odd = record(Op::Noop);
    odd.path = b"a\xff b\n".to_vec();
    let entry = Entry { seq: Seq(1), record: odd, outcome: Outcome::Void };
    assert_eq!(json(&entry)["path_hex"], "61ff20620a");
    assert_eq!(
        line(&entry),
        "1 2023-11-14T22:13:20.123456789Z void noop \"a\\xff b\\n\" by 1000:100"
    );
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    Flip,
    Zero,
    Truncate,
    Duplicate,
    Swap,
    Remove,
}

/// Damages one file of the journal at a random place. `starts`: where its records begin.
fn damage(file: &Path, how: Damage, starts: &[usize], rng: &mut Rng) {
    let mut bytes = fs::read(file).unwrap();
    let used = starts.last().copied().unwrap_or(64);
    let at = rng.below(used as u64) as usize;
    let record = |rng: &mut Rng| {
        let nth = rng.below(starts.len() as u64 - 1) as usize;
        starts[nth]..starts[nth + 1]
    };
    match how {
        Damage::Flip => bytes[at] ^= 1 << rng.below(8),
        Damage::Zero => {
            let end = (at + 1 + rng.below(600) as usize).min(used);
            bytes[at..end].fill(0);
        }
        Damage::Truncate => bytes.truncate(at),
        Damage::Duplicate => {
            let (from, to) = (record(rng), record(rng));
            let copy = bytes[from].to_vec();
            let end = (to.start + copy.len()).min(bytes.len());
            bytes[to.start..end].copy_from_slice(&copy[..end - to.start]);
        }
        Damage::Swap => {
            let nth = rng.below(starts.len() as u64 - 2) as usize;
            bytes[starts[nth]..starts[nth + 2]].rotate_left(starts[nth + 1] - starts[nth]);
        }
        Damage::Remove => return fs::remove_file(file).unwrap(),
    }
    fs::write(file, bytes).unwrap();
}

/// Where the records of a segment begin, and where the last one ends.
fn starts(file: &Path) -> Vec<usize> {
    let mut current = Current::open(file).map_err(|(at, _)| at).unwrap();
    let mut starts = vec![current.spot.at];
    let mut buf = Vec::new();
    while recover::next(&current.bytes, &mut current.spot, Seq(0), &mut buf).is_ok() {
        starts.push(current.spot.at);
    }
    starts
}

/// Whatever happens to an acknowledged journal: open refuses, or all of it is there; what is read
/// is what was written, as far as it goes; and a dump that stops early says so.
#[test]
fn damage_is_never_answered_wrongly() {
    let whole = tempfile::tempdir().unwrap();
    let written: Vec<Record> = (0..2200).map(small).collect();
    {
        let log = log(whole.path());
        for record in &written {
            let ticket = log.append(record).unwrap();
            log.settle(ticket, Outcome::Done);
        }
        log.sync(log.last()).unwrap();
    }
    let firsts = segments_in(whole.path()).unwrap();
    assert!(firsts.len() > 1);
    let all = [
        Damage::Flip,
        Damage::Zero,
        Damage::Truncate,
        Damage::Duplicate,
        Damage::Swap,
        Damage::Remove,
    ];
    for seed in 0..120 {
        let mut rng = Rng::new(seed);
        let how = all[seed as usize % all.len()];
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(whole.path()).unwrap() {
            let from = entry.unwrap().path();
            fs::copy(&from, dir.path().join(from.file_name().unwrap())).unwrap();
        }
        let hit = firsts[rng.below(firsts.len() as u64) as usize];
        let file = dir.path().join(segment_name(hit));
        let starts = starts(&file);
        damage(&file, how, &starts, &mut rng);
        let case = format!("seed {seed}: {how:?} in {}", file.display());

        let (entries, end) = dump(dir.path(), Options::default());
        let first = entries.first().map_or(0, |entry| entry.seq.0 as usize - 1);
        for (nth, entry) in entries.iter().enumerate() {
            assert_eq!(entry.record, written[first + nth], "{case}");
            // a zeroed outcome reads as intended, which is redone; nothing else may come of it
            assert_ne!(entry.outcome, Outcome::Void, "{case}");
        }
        let complete = first + entries.len() == written.len();
        assert!(complete || end.is_damage(), "{case}: {end}");
        let (back, _) = dump(dir.path(), Options { reverse: true, ..Options::default() });
        assert!(back.iter().rev().eq(&entries), "{case}: in reverse");

        match Log::open(dir.path()) {
            Err(LogError::Corrupt { .. } | LogError::Io { .. }) => {}
            Err(other) => panic!("{case}: {other}"),
            Ok(log) => {
                // older segments are checked when they are read
                let read: Vec<_> = log.entries(log.first()).collect();
                let good = read.iter().take_while(|entry| entry.is_ok()).count();
                assert!(good == read.len() || matches!(read[good], Err(LogError::Corrupt { .. })));
                for entry in read.into_iter().flatten() {
                    assert_eq!(entry.record, written[entry.seq.0 as usize - 1], "{case}");
                }
                assert_eq!(log.last().0 as usize, written.len(), "{case}: lost in silence");
            }
        }
    }
}

#[test]
fn what_is_no_journal_says_so() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Dump::open(dir.path(), Options::default()), Err(DumpError::Empty { .. })));
    let missing = dir.path().join("missing");
    assert!(matches!(Dump::open(&missing, Options::default()), Err(DumpError::Io { .. })));
    let other = dir.path().join("other");
    fs::write(&other, [7; 5000]).unwrap();
    let (entries, end) = dump(&other, Options::default());
    assert!(entries.is_empty() && matches!(end.why, Why::Stop(Stop::Corrupt(Fault::Magic))));
}

#[test]
fn a_segment_that_lost_its_empty_tail_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    log(dir.path()).append(&small(1)).unwrap();
    let file = dir.path().join(segment_name(Seq(1)));
    fs::write(&file, &fs::read(&file).unwrap()[..1000]).unwrap();
    let (entries, end) = dump(&file, Options::default());
    assert_eq!(seqs(&entries), [1]);
    assert!(matches!(end.why, Why::Stop(Stop::Corrupt(Fault::Short))), "{end}");
}
