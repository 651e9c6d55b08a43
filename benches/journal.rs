//! What a journal costs: `cargo bench --bench journal`.

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};

use imz::kml::codec::Outcome;
use imz::kml::log::{Log, Options};
use imz::kml::optimise::optimise;
use imz::kml::record::{
    Attr, Fid, Gone, Name, Op, Origin, Over, Place, Range, Record, Seq, Stamp, Time,
};

fn main() {
    divan::main();
}

fn record(n: u64, op: Op) -> Record {
    let path = format!("src/some/directory/file-{n}").into_bytes();
    Record { time_ns: n, origin: Origin::default(), uid: 1000, gid: 1000, path, op }
}

fn place(n: u64) -> Place {
    let name = Name::new(format!("file-{n}").as_bytes()).expect("a good name");
    Place { dir: Fid(1 + n % 100), base: Stamp(3), name }
}

fn create(n: u64) -> Record {
    record(n, Op::Create { at: place(n), fid: Fid(1000 + n), mode: 0o644, umask: 0o022 })
}

fn store(n: u64) -> Record {
    let ranges = vec![Range { at: 0, len: n }];
    let (base, mtime) = (Stamp(0), Time::default());
    record(n, Op::Store { fid: Fid(1000 + n), base, size: n, mtime, ranges, old_size: 0 })
}

fn unlink(n: u64) -> Record {
    let attr = Attr { nlink: 1, mode: 0o100_644, ..Attr::default() };
    let gone = Gone { fid: Fid(1000 + n), base: Stamp(0), attr, target: None };
    record(n, Op::Unlink { at: place(n), gone })
}

fn filled(count: u64) -> (tempfile::TempDir, Log) {
    let dir = tempfile::tempdir().expect("a directory");
    let log = Log::open_or_create(dir.path(), 1, 1, Options::default()).expect("a journal");
    for n in 0..count {
        let ticket = log.append(&create(n)).expect("room");
        log.settle(ticket, Outcome::Done);
    }
    (dir, log)
}

/// One intention and its outcome; nothing is made durable but at the ends of segments.
#[divan::bench]
fn append_and_settle(bencher: Bencher) {
    let (_dir, log) = filled(0);
    let record = create(7);
    bencher.counter(ItemsCount::new(1u32)).bench(|| {
        let ticket = log.append(&record).expect("room");
        log.settle(ticket, Outcome::Done);
        if log.last().0.is_multiple_of(100_000) {
            log.trim(log.last()).expect("trimmed");
        }
    });
}

/// One record made durable by itself: the disk's speed.
#[divan::bench(sample_count = 20, sample_size = 5)]
fn append_and_sync(bencher: Bencher) {
    let (_dir, log) = filled(0);
    let record = create(7);
    bencher.counter(ItemsCount::new(1u32)).bench(|| {
        let ticket = log.append(&record).expect("room");
        log.sync(ticket.seq).expect("durable");
    });
}

#[divan::bench(args = [50_000])]
fn scan(bencher: Bencher, count: u64) {
    let (_dir, log) = filled(count);
    let counted = bencher.counter(ItemsCount::new(count)).counter(BytesCount::new(log.bytes()));
    counted.bench(|| log.entries(Seq(1)).filter(Result::is_ok).count());
}

#[divan::bench(args = [50_000])]
fn scan_back(bencher: Bencher, count: u64) {
    let (_dir, log) = filled(count);
    let counted = bencher.counter(ItemsCount::new(count));
    counted.bench(|| log.entries_back(log.last()).filter(Result::is_ok).count());
}

/// A build: files come, are written twice, are renamed into place, and half of them go.
#[divan::bench(args = [10_000])]
fn optimise_a_build(bencher: Bencher, files: u64) {
    let mut records = Vec::new();
    for n in 0..files {
        records.extend([create(n), store(n), store(n)]);
        if n % 2 == 0 {
            records.push(unlink(n));
        } else {
            let (from, to) = (place(n), Place { name: place(n + files).name, ..place(n) });
            let over = Over::Nothing { noreplace: false };
            let rename = Op::Rename { from, to, fid: Fid(1000 + n), base: Stamp(0), over };
            records.push(record(n, rename));
        }
    }
    let records: Vec<(Seq, Record)> =
        records.into_iter().enumerate().map(|(n, r)| (Seq(n as u64 + 1), r)).collect();
    let counted = bencher.counter(ItemsCount::new(records.len()));
    counted.bench(|| optimise(divan::black_box(&records)));
}
