//! What drives the targets: mutations, bounds on time and memory, and what is said in the end.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Largest single allocation that an input may cause, bytes: a frame's bound several times over.
pub const ALLOC_MAX: usize = 8 << 20;
/// An input that takes longer hangs; generous, for machines that do other things as well.
const INPUT_TIME_MAX: Duration = Duration::from_secs(60);
const INPUT_LEN_MAX: usize = 64 << 10;
const SEEDS_MAX: usize = 4000;
/// One in so many inputs keeps its wrong checksums.
const UNREPAIRED: u64 = 8;

/// What is fuzzed.
pub trait Target {
    fn name(&self) -> &'static str;
    fn seeds(&self, rng: &mut Rng) -> Vec<Vec<u8>>;
    /// Puts checksums right.
    fn repair(&self, bytes: &mut [u8]);
    /// Panics if something is wrong; true if the input was read well.
    fn run(&mut self, bytes: &[u8]) -> bool;
}

// ---- chance ----------------------------------------------------------------------------------

/// Splitmix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// Values at which bounds are.
pub const DICTIONARY: [u64; 26] = [
    0,
    1,
    2,
    7,
    8,
    64,
    72,
    127,
    128,
    255,
    256,
    4095,
    4096,
    32_767,
    65_535,
    65_536,
    65_537,
    (1 << 20) + 1,
    2 << 20,
    (1 << 23) - 1,
    i32::MAX as u64,
    u32::MAX as u64,
    1 << 40,
    i64::MAX as u64,
    i64::MAX as u64 + 1,
    u64::MAX,
];

fn mutate(rng: &mut Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = rng.pick(seeds).clone();
    for _ in 0..=rng.below(6) {
        let len = bytes.len();
        if len == 0 {
            bytes = rng.pick(seeds).clone();
            continue;
        }
        let at = rng.below(len);
        match rng.below(11) {
            0 | 1 => bytes[at] ^= 1 << rng.below(8),
            2 => bytes[at] = rng.next() as u8,
            3 | 4 => {
                let value = rng.pick(&DICTIONARY).to_le_bytes();
                let width = *rng.pick(&[1, 2, 4, 8]);
                let end = len.min(at + width);
                bytes[at..end].copy_from_slice(&value[..end - at]);
            }
            5 => bytes.truncate(at),
            6 => {
                let more = *rng.pick(&[1, 8, 60, 700]);
                bytes.splice(at..at, rng.bytes(more));
            }
            7 => {
                let end = at + rng.below(len - at);
                bytes.drain(at..end);
            }
            8 => {
                let end = at + rng.below((len - at).min(300));
                let part = bytes[at..end].to_vec();
                let to = rng.below(bytes.len());
                bytes.splice(to..to, part);
            }
            9 => {
                let other = rng.pick(seeds);
                if !other.is_empty() {
                    let from = rng.below(other.len());
                    bytes.splice(at.., other[from..].iter().copied());
                }
            }
            _ => {
                let end = at + rng.below((len - at).min(40));
                bytes[at..end].fill(0);
            }
        }
    }
    bytes.truncate(INPUT_LEN_MAX);
    bytes
}

// ---- memory ----------------------------------------------------------------------------------

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, and the largest request of each thread.
struct Watched;

#[global_allocator]
static ALLOCATOR: Watched = Watched;

fn note(len: usize) {
    // a thread that is ending has no cell any more
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(len)));
}

// SAFETY: every call goes to the system's allocator with what it was given.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        note(len);
        unsafe { System.realloc(at, layout, len) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        unsafe { System.dealloc(at, layout) }
    }
}

// ---- the run ---------------------------------------------------------------------------------

pub fn scratch() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("imz-fuzz-").tempdir_in(base).unwrap()
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |value| value.parse().unwrap())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn from_hex(text: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(digit).collect()
}

/// The input under way: since when, and its bytes.
type Current = Arc<Mutex<Option<(Instant, Vec<u8>)>>>;

/// Ends the process, saying why, when one input takes too long.
fn watch(name: &'static str, current: &Current) {
    let current = Arc::downgrade(current);
    std::thread::spawn(move || {
        while let Some(current) = current.upgrade() {
            if let Some((since, bytes)) = &*current.lock().unwrap()
                && since.elapsed() > INPUT_TIME_MAX
            {
                eprintln!("{name}: an input hangs: {}", hex(bytes));
                std::process::abort();
            }
            drop(current);
            std::thread::sleep(Duration::from_millis(500));
        }
    });
}

fn one(target: &mut dyn Target, current: &Current, bytes: &[u8]) -> bool {
    *current.lock().unwrap() = Some((Instant::now(), bytes.to_vec()));
    LARGEST.set(0);
    let done = catch_unwind(AssertUnwindSafe(|| target.run(bytes)));
    let largest = LARGEST.get();
    *current.lock().unwrap() = None;
    let name = target.name();
    match done {
        Ok(read) if largest <= ALLOC_MAX => read,
        Ok(_) => panic!("{name}: an allocation of {largest} bytes by the input {}", hex(bytes)),
        Err(_) => panic!("{name}: it panicked, as is said above, by the input {}", hex(bytes)),
    }
}

/// Tries what was kept, then what chance makes, for as long as is wanted.
pub fn fuzz(target: &mut dyn Target) {
    let seconds = number("IMZ_FUZZ_SECONDS", 5);
    let mut rng = Rng(number("IMZ_FUZZ_SEED", 1));
    let current: Current = Arc::default();
    let name = target.name();
    watch(name, &current);
    let mut seeds = target.seeds(&mut rng);
    for (_, kept) in super::corpus(name) {
        one(target, &current, &kept);
        seeds.push(kept);
    }
    for seed in seeds.clone() {
        one(target, &current, &seed);
    }
    let (began, mut count, mut read) = (Instant::now(), 0u64, 0u64);
    while began.elapsed() < Duration::from_secs(seconds) {
        let mut bytes = mutate(&mut rng, &seeds);
        if !rng.next().is_multiple_of(UNREPAIRED) {
            target.repair(&mut bytes);
        }
        count += 1;
        if one(target, &current, &bytes) {
            read += 1;
            let nth = rng.below(SEEDS_MAX);
            match seeds.get_mut(nth) {
                Some(seed) if read.is_multiple_of(16) => *seed = bytes,
                None if read.is_multiple_of(4) => seeds.push(bytes),
                _ => {}
            }
        }
    }
    let rate = count as f64 / began.elapsed().as_secs_f64();
    println!("{name}: {count} inputs, {rate:.0} a second, {read} read well, no finding");
    assert!(read > 0, "no input was read well: only the first check was reached");
}
