//! What many clients cost a server: memory, time until all are told, and the processor at rest.
//!
//!   cargo bench --bench load -- [--clients N] [--promises N] [--rest SECONDS] [--dir WHERE] [--json]
//!
//! One process has all clients (1,000), over loopback and the real protocol; the server is a
//! process of the release binary. Half of the promises (100,000) are for objects that all hold,
//! the other half for objects that one client holds. Then one more client changes files that all
//! hold: once as a client that was away, with a batch alone; once with a permit that it asks for
//! first. At last all rest, and only ask whether the server is there.
//!
//! The served directory is in /dev/shm or in WHERE, and is removed at the end.

#![allow(clippy::unwrap_used)] // a failure ends the run, and says where

mod herd;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use herd::{Herd, Serving, Told};
use imz::lento::policy;
use serde_json::json;

/// Changes of each of the two kinds.
const ROUNDS: usize = 10;

struct Args {
    clients: usize,
    promises: usize,
    rest: Duration,
    dir: PathBuf,
    json: bool,
}

fn arguments() -> Option<Args> {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let rest = Duration::from_secs(30);
    let mut args = Args { clients: 1000, promises: 100_000, rest, dir, json: false };
    let mut words = std::env::args().skip(1);
    let mut is_bench = false;
    while let Some(word) = words.next() {
        match &word[..] {
            "--bench" => is_bench = true,
            "--json" => args.json = true,
            "--clients" => args.clients = words.next()?.parse().ok()?,
            "--promises" => args.promises = words.next()?.parse().ok()?,
            "--rest" => args.rest = Duration::from_secs(words.next()?.parse().ok()?),
            "--dir" => args.dir = words.next()?.into(),
            _ => return None,
        }
    }
    // half of each client's: a directory and the files in it, one for each round at least
    let half = args.promises / args.clients.max(1) / 2;
    (is_bench && args.clients >= 2 && half > 2 * ROUNDS).then_some(args)
}

fn main() {
    let Some(args) = arguments() else {
        // cargo test runs every bench, too
        eprintln!(
            "load: cargo bench --bench load -- [--clients N] [--promises N] [--rest SECONDS] \
             [--dir WHERE] [--json]; at least {} promises for each of 2 clients or more",
            4 * ROUNDS + 2
        );
        return;
    };
    let imz = Path::new(env!("CARGO_BIN_EXE_imz"));
    let dir = tempfile::Builder::new().prefix("imz-load-").tempdir_in(&args.dir).unwrap();
    let files = args.promises / args.clients / 2 - 1;
    herd::make_tree(dir.path(), args.clients, files, files);
    let places = herd::scout(imz, dir.path());

    let serving = Serving::start(imz, dir.path());
    let mut herd = Herd::new();
    let empty = serving.resident_len();
    herd.connect(serving.addr, args.clients);
    let connected = serving.resident_len();
    let promises = herd.spread(&places);
    let promised = serving.resident_len();

    herd.connect(serving.addr, 1);
    let (early, late) = places.shared.split_at(ROUNDS);
    let by_batch: Vec<Told> = early.iter().map(|file| herd.change(*file, false)).collect();
    let late = &late[..ROUNDS];
    let by_permit: Vec<Told> = late.iter().map(|file| herd.change(*file, true)).collect();
    let all = by_batch.iter().chain(&by_permit).all(|told| told.holders == args.clients);
    assert!(all, "some were not told before the change was acknowledged");
    let busy = serving.cpu_time();
    let changed = serving.resident_len();

    herd.scatter();
    herd.rest(policy::PING_AFTER * 2);
    let (began, before) = (Instant::now(), serving.cpu_time());
    herd.rest(args.rest);
    let used = serving.cpu_time().saturating_sub(before);
    let share = used.as_secs_f64() / began.elapsed().as_secs_f64() * 100.0;

    let figures = json!({
        "clients": args.clients,
        "promises": promises,
        "server_empty_bytes": empty,
        "server_full_bytes": changed,
        "client_bytes": (connected.saturating_sub(empty)) as f64 / args.clients as f64,
        "promise_bytes": (promised.saturating_sub(connected)) as f64 / promises as f64,
        "batch_told_ms": spans(&by_batch, |told| told.all_told),
        "batch_acked_ms": spans(&by_batch, |told| told.acked),
        "permit_told_ms": spans(&by_permit, |told| told.all_told),
        "permit_granted_ms": spans(&by_permit, |told| told.granted),
        "permit_acked_ms": spans(&by_permit, |told| told.acked),
        "permit_reread_ms": spans(&by_permit, |told| told.reread),
        "busy_cpu_s": busy.as_secs_f64(),
        "idle_cpu_percent": share,
    });
    if args.json {
        println!("{figures}");
    } else {
        print(&figures);
    }
    drop(herd);
    serving.stop();
}

/// The median and the worst, ms.
fn spans(all: &[Told], of: impl Fn(&Told) -> Duration) -> [f64; 2] {
    let mut spans: Vec<f64> = all.iter().map(|told| of(told).as_secs_f64() * 1000.0).collect();
    spans.sort_by(f64::total_cmp);
    [spans[spans.len() / 2], spans[spans.len() - 1]]
}

fn print(figures: &serde_json::Value) {
    let of = |name: &str| figures[name].as_f64().unwrap();
    let span = |name: &str| {
        let [median, worst] = [0, 1].map(|i| figures[name][i].as_f64().unwrap());
        format!("{median:.0} ms (worst of {ROUNDS}: {worst:.0})")
    };
    println!("{} clients, {} promises", figures["clients"], figures["promises"]);
    println!("memory a client        {:.1} KiB", of("client_bytes") / 1024.0);
    println!("memory a promise       {:.0} bytes", of("promise_bytes"));
    println!("server, empty          {:.1} MiB", of("server_empty_bytes") / 1_048_576.0);
    println!("server, at the end     {:.1} MiB", of("server_full_bytes") / 1_048_576.0);
    println!("batch: all are told    {}", span("batch_told_ms"));
    println!("batch: acknowledged    {}", span("batch_acked_ms"));
    println!("permit: all are told   {}", span("permit_told_ms"));
    println!("permit: granted        {}", span("permit_granted_ms"));
    println!("permit: acknowledged   {}", span("permit_acked_ms"));
    println!("then: all read it again {}", span("permit_reread_ms"));
    println!("processor, all idle    {:.2}% of a core", of("idle_cpu_percent"));
    println!("processor until then   {:.2} s", of("busy_cpu_s"));
}
