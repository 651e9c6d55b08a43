//! What happens in a history: made from a seed, or told by a test. Leaving steps out of a plan
//! leaves a plan, which is what shrinking lives on.

use std::fmt;

use crate::rng::Rng;

/// Microseconds of virtual time.
pub type Micros = u64;
pub const MS: Micros = 1000;
pub const SECOND: Micros = 1000 * MS;

/// What an application does, by paths from the root.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// with so many blocks of data
    Create {
        path: String,
        blocks: u64,
    },
    /// blocks `at..at + blocks` get new data; so much time passes from open to close
    Write {
        path: String,
        at: u64,
        blocks: u64,
        truncate: bool,
        hold: Micros,
    },
    /// all of the file, or one block of it
    Read {
        path: String,
        block: Option<u64>,
    },
    Rename {
        from: String,
        to: String,
        exchange: bool,
    },
    Unlink(String),
    Mkdir(String),
    Rmdir(String),
    Link {
        old: String,
        new: String,
    },
    Chmod(String, u32),
    Truncate(String, u64),
    /// sets a modification time that others use as well
    Touch(String, i64),
    Readdir(String),
    Stat(String),
    Fsync(String),
    /// waits until the server has everything
    Sync,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum What {
    Do {
        client: usize,
        op: Op,
    },
    /// the connection ends, and both sides are told
    Cut(usize),
    /// what one side sends is lost from now on, and nobody is told
    HalfOpen {
        client: usize,
        to_server: bool,
    },
    /// nothing passes for a while
    Partition {
        client: usize,
        lasts: Micros,
    },
    /// the process dies, and begins anew after a while
    Kill {
        client: usize,
        down: Micros,
    },
    /// the machine loses power
    Power {
        client: usize,
        down: Micros,
    },
    /// the process is stopped, and goes on after a while
    Stop {
        client: usize,
        lasts: Micros,
    },
    /// clean data leave the cache
    Evict {
        client: usize,
        nth: u64,
    },
    KillServer {
        down: Micros,
    },
    PowerServer {
        down: Micros,
    },
    /// changes find no room
    FullServer {
        lasts: Micros,
    },
    /// syncs take so much longer
    SlowDisk {
        lasts: Micros,
    },
    /// the server forgets its history
    TrimServer,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    pub at: Micros,
    pub what: What,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Step {{ at: {}, what: What::{:?} }}", self.at, self.what)
    }
}

/// What does not change during a history.
#[derive(Clone, Debug)]
pub struct Setup {
    /// on the way of a message, least and most
    pub latency: (Micros, Micros),
    /// of every node's clock against true time; the server's is the last
    pub drift_ppm: Vec<i64>,
    /// how long changes rest
    pub age: Micros,
    /// entries of a page
    pub page_count: usize,
    /// contents up to here travel with their record, bytes
    pub inline_len_max: usize,
    /// records of a batch
    pub batch_count_max: usize,
    /// a longer file is not fetched whole when it is opened, bytes
    pub whole_len_max: u64,
    /// of a sync at the server, most
    pub sync_time: Micros,
    /// every access needs its right: each read must see every write that was complete before it
    pub strict: bool,
    /// room is reserved, and there is so much of it, bytes (space.rs)
    pub room: Option<u64>,
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub clients: usize,
    pub setup: Setup,
    pub steps: Vec<Step>,
}

/// Directories that are there from the start, and names that are used in them.
pub const DIRS: [&str; 5] = ["", "a", "b", "a/x", "b/y"];
const NAMES: [&str; 4] = ["f0", "f1", "f2", "f3"];
const SUBS: [&str; 2] = ["s0", "s1"];
/// Most blocks of a file.
const BLOCKS_MAX: u64 = 8;

impl Plan {
    /// A history of so many operations.
    pub fn of(seed: u64, ops: usize) -> Plan {
        let mut rng = Rng::new(seed);
        let clients = rng.within(2, 4) as usize;
        let latency_min = rng.pick(&[100, 500, 2 * MS, 20 * MS]);
        let latency = (latency_min, latency_min * rng.within(1, 8));
        let drift = |rng: &mut Rng| rng.within(0, 2000) as i64 - 1000;
        let setup = Setup {
            latency,
            drift_ppm: (0..=clients).map(|_| drift(&mut rng)).collect(),
            age: rng.pick(&[0, 50 * MS, 300 * MS, 2 * SECOND]),
            page_count: rng.within(1, 6) as usize,
            inline_len_max: rng.pick(&[0, 16, 64]),
            batch_count_max: rng.pick(&[1, 2, 5, 1000]),
            whole_len_max: rng.pick(&[24, 64]),
            sync_time: rng.pick(&[MS, 20 * MS, 300 * MS]),
            strict: false,
            room: None,
        };
        let span = ops as u64 * rng.pick(&[20 * MS, 100 * MS, 400 * MS]);
        // a few directories and files, so that clients meet
        let dirs = rng.within(1, DIRS.len() as u64) as usize;
        let mut steps = Vec::new();
        for _ in 0..ops {
            let client = rng.below(clients as u64) as usize;
            let what = What::Do { client, op: random_op(&mut rng, &DIRS[..dirs]) };
            steps.push(Step { at: rng.below(span), what });
        }
        let evictions = rng.below(ops as u64 / 8 + 1);
        for _ in 0..evictions {
            let (client, nth) = (rng.below(clients as u64) as usize, rng.below(64));
            steps.push(Step { at: rng.below(span), what: What::Evict { client, nth } });
        }
        let faults = rng.pick(&[0, 1, 3, 8, 15]);
        for _ in 0..faults {
            let client = rng.below(clients as u64) as usize;
            steps.push(Step { at: rng.below(span), what: random_fault(&mut rng, client) });
        }
        steps.sort_by_key(|step| step.at);
        Plan { seed, clients, setup, steps }
    }
    /// A history in which nothing fails, in strict mode: each block of a file is a register.
    pub fn strict(seed: u64, ops: usize) -> Plan {
        let mut plan = Plan::of(seed, ops);
        plan.setup.strict = true;
        plan.steps.retain_mut(|step| match &mut step.what {
            What::Do { op: Op::Truncate(..), .. } => false,
            What::Do { op: Op::Write { truncate, hold, .. }, .. } => {
                (*truncate, *hold) = (false, 0);
                true
            }
            What::Do { .. } | What::Evict { .. } => true,
            _ => false,
        });
        plan
    }
}

fn random_path(rng: &mut Rng, dirs: &[&str]) -> String {
    join(rng.pick(dirs), rng.pick(&NAMES))
}

fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") }
}

fn random_op(rng: &mut Rng, dirs: &[&str]) -> Op {
    let path = random_path(rng, dirs);
    let sub = join(rng.pick(dirs), rng.pick(&SUBS));
    // sometimes within one of the directories that come and go
    let path = if rng.one_in(8) { join(&sub, rng.pick(&NAMES)) } else { path };
    let dir_or_sub = if rng.one_in(3) { sub.clone() } else { rng.pick(dirs).to_owned() };
    let blocks = rng.within(0, BLOCKS_MAX / 2);
    let at = rng.below(BLOCKS_MAX / 2);
    match rng.below(100) {
        0..14 => Op::Create { path, blocks },
        14..32 => {
            let truncate = rng.one_in(3);
            let hold = rng.pick(&[0, 0, MS, 100 * MS, 2 * SECOND]);
            Op::Write { path, at: if truncate { 0 } else { at }, blocks, truncate, hold }
        }
        32..50 => Op::Read { path, block: rng.one_in(3).then_some(at) },
        50..58 => {
            let to = random_path(rng, dirs);
            Op::Rename { from: path, to, exchange: rng.one_in(5) }
        }
        58..60 => {
            let to = join(rng.pick(dirs), rng.pick(&SUBS));
            Op::Rename { from: sub, to, exchange: false }
        }
        60..66 => Op::Unlink(path),
        66..70 => Op::Mkdir(sub),
        70..73 => Op::Rmdir(sub),
        73..77 => Op::Link { old: path, new: random_path(rng, dirs) },
        77..80 => Op::Chmod(path, rng.pick(&[0o600, 0o640, 0o755])),
        80..83 => Op::Truncate(path, blocks),
        83..85 => Op::Touch(path, rng.within(1, 3) as i64),
        85..91 => Op::Readdir(dir_or_sub),
        91..95 => Op::Stat(path),
        95..98 => Op::Fsync(path),
        _ => Op::Sync,
    }
}

fn random_fault(rng: &mut Rng, client: usize) -> What {
    let long = rng.pick(&[50 * MS, 2 * SECOND, 8 * SECOND, 15 * SECOND, 30 * SECOND]);
    match rng.below(21) {
        20 => What::FullServer { lasts: long },
        0..4 => What::Cut(client),
        4..6 => What::HalfOpen { client, to_server: rng.one_in(2) },
        6..9 => What::Partition { client, lasts: long },
        9..11 => What::Kill { client, down: long },
        11..13 => What::Power { client, down: long },
        13 => What::Stop { client, lasts: long },
        14..16 => What::KillServer { down: long },
        16 => What::PowerServer { down: long },
        17 => What::FullServer { lasts: long },
        18 => What::SlowDisk { lasts: long.min(8 * SECOND) },
        _ => What::TrimServer,
    }
}
