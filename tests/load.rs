//! Many clients of one server: nobody is forgotten, and each costs little. The figures are
//! `benches/load.rs`'s matter; no time is measured here.

#![allow(clippy::unwrap_used)] // tests: it is the message

#[path = "../benches/herd/mod.rs"]
mod herd;

use std::path::Path;

use herd::{Herd, Serving};

const CLIENTS: usize = 200;
const PROMISES: usize = 5_000;
/// Three times what is aimed at, since an allocator takes its memory by the page.
const CLIENT_LEN_MAX: u64 = 3 * (20 << 10);
const PROMISE_LEN_MAX: u64 = 3 * 100;

#[test]
fn all_who_hold_a_file_are_told_before_its_change_is_acknowledged() {
    let imz = Path::new(env!("CARGO_BIN_EXE_imz"));
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let dir = tempfile::tempdir_in(base).unwrap();
    let files = PROMISES / CLIENTS / 2;
    herd::make_tree(dir.path(), CLIENTS, files, files);
    let places = herd::scout(imz, dir.path());

    let serving = Serving::start(imz, dir.path());
    let mut herd = Herd::new();
    let empty = serving.resident_len();
    herd.connect(serving.addr, CLIENTS);
    let connected = serving.resident_len();
    let client_len = connected.saturating_sub(empty) / CLIENTS as u64;
    assert!(client_len <= CLIENT_LEN_MAX, "{client_len} bytes a client");

    let promises = herd.spread(&places);
    assert!(promises >= PROMISES, "{promises}");
    let promise_len = serving.resident_len().saturating_sub(connected) / promises as u64;
    assert!(promise_len <= PROMISE_LEN_MAX, "{promise_len} bytes a promise");

    herd.connect(serving.addr, 1);
    for (at, file) in places.shared[..4].iter().enumerate() {
        let told = herd.change(*file, at % 2 == 1);
        assert_eq!(told.holders, CLIENTS, "change {at}");
    }
    serving.stop();
}
