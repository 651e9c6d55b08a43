//! A disk that can lose its power: an image file that knows which writes were flushed.
//!
//! ```text
//!   ext4 > loop device > a file that this process serves by FUSE > what was written, what flushed
//! ```
//!
//! The loop device writes through to the file and turns each flush of the file system into an
//! fsync of it. A cut is what a power cut may leave: everything that was written before the last
//! flush, and of what was written after it each 4 KiB by the toss of a coin, later ones perhaps
//! without earlier ones. (4 KiB, since disks do not tear their sectors.) That is dm-log-writes with
//! its replay, for kernels that have no device mapper; a copy of a live image would be no point in
//! time, and a snapshot would keep the order of unflushed writes.
//!
//! The file is served by a process of its own (this test program, run once more): one that waits in
//! the kernel for a file that it serves itself cannot even be killed. A line to it asks for a cut.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};

use imz::presto::abi::init::{self, Offer, Taken, flag};
use imz::presto::abi::reply::{self, Entry, OpenFlags};
use imz::presto::abi::{Op, Raw};
use imz::sys::dev_fuse;
use imz::sys::fs::Stat;

use super::common::tree::Rng;
use super::common::{command, mount_point, run, told, unable};

/// What survives or not as a whole, bytes.
const SECTOR: usize = 4096;
const WRITE_LEN_MAX: u32 = 1 << 20;

/// What was written.
struct Record {
    /// with all writes, for reads
    current: File,
    /// with those that were flushed
    durable: File,
    /// since the last flush
    fresh: Vec<(u64, Vec<u8>)>,
    flushes: u64,
}

/// A mounted ext4 on a recorded disk.
pub struct Recorder {
    /// where the ext4 is mounted
    dir: PathBuf,
    /// the image, served by this process
    file: PathBuf,
    server: Child,
    answers: BufReader<ChildStdout>,
    _holder: tempfile::TempDir,
}

fn copy(from: &Path, to: &Path) {
    run(&["cp", "--sparse=always", from.to_str().unwrap(), to.to_str().unwrap()]);
}

impl Recorder {
    /// An empty disk. `None`: it cannot be had here.
    pub fn new(mib: u64, dir: &Path) -> Option<Recorder> {
        let image = tempfile::Builder::new().prefix("imz-power-").tempdir_in("/dev/shm").unwrap();
        let path = image.path().join("first");
        File::create(&path).unwrap().set_len(mib << 20).unwrap();
        let lazy = "lazy_itable_init=0,lazy_journal_init=0";
        let words = ["mkfs.ext4", "-F", "-q", "-b", "4096", "-J", "size=4", "-E", lazy];
        run(&[&words[..], &[path.to_str().unwrap()]].concat());
        Recorder::of(&path, dir)
    }

    /// A disk as it was cut, whose file system recovers now; on the same directory as before.
    pub fn of(cut: &Path, dir: &Path) -> Option<Recorder> {
        let holder = tempfile::Builder::new().prefix("imz-power-").tempdir_in("/dev/shm").unwrap();
        let (current, durable) = (holder.path().join("current"), holder.path().join("durable"));
        copy(cut, &current);
        copy(cut, &durable);
        let file = mount_point().with_extension("image");
        File::create(&file).unwrap();
        #[allow(clippy::zombie_processes)] // one that never serves ends with this program
        let mut server = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "recorder::the_process", "--nocapture", "--test-threads=1"])
            .env("IMZ_POWER_DISK", holder.path())
            .env("IMZ_POWER_FILE", &file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut answers = BufReader::new(server.stdout.take().unwrap());
        if heard(&mut answers).is_none() {
            return unable("no file can be served by FUSE");
        }
        let words = ["mount", "-o", "loop,commit=1", file.to_str().unwrap(), dir.to_str().unwrap()];
        let out = command(&words).output().unwrap();
        let dir = dir.to_owned();
        let recorder = Recorder { dir, file, server, answers, _holder: holder };
        match out.status.success() {
            true => Some(recorder),
            false => unable(&format!("no loop mount of such a file: {}", told(&out))),
        }
    }

    /// The image as a power cut at this moment might leave it; how many flushes came before.
    pub fn cut(&mut self, rng: &mut Rng, to: &Path) -> u64 {
        let line = format!("{} {}\n", rng.next(), to.display());
        self.server.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
        heard(&mut self.answers).expect("the disk's process has ended")
    }
}

/// The number in the next answer; the harness of tests says other things as well.
fn heard(answers: &mut impl BufRead) -> Option<u64> {
    let lines = answers.lines().map_while(Result::ok);
    let mut numbers = lines.filter_map(|line| line.rsplit("disk: ").next()?.parse().ok());
    numbers.next()
}

/// What the disk's process does: serve, and cut when it is told to, as long as somebody listens.
#[test]
fn the_process() {
    let Some(disk) = std::env::var_os("IMZ_POWER_DISK").map(PathBuf::from) else { return };
    let file = std::env::var_os("IMZ_POWER_FILE").map(PathBuf::from).unwrap();
    let (current, durable) = (disk.join("current"), disk.join("durable"));
    let open = |path: &Path| File::options().read(true).write(true).open(path).unwrap();
    let (flushes, fresh) = (0, Vec::new());
    let len = fs::metadata(&current).unwrap().len();
    let record = Record { current: open(&current), durable: open(&durable), fresh, flushes };
    let record = Arc::new(Mutex::new(record));
    serve(&file, len, record.clone()).unwrap();
    println!("disk: 0");
    for line in io::stdin().lines().map_while(Result::ok) {
        let (seed, to) = line.split_once(' ').unwrap();
        let record = record.lock().unwrap();
        cut(&record, &durable, &mut Rng(seed.parse().unwrap()), Path::new(to));
        println!("disk: {}", record.flushes);
    }
}

fn cut(record: &Record, durable: &Path, rng: &mut Rng, to: &Path) {
    copy(durable, to);
    let file = File::options().write(true).open(to).unwrap();
    // of some disks nothing is left, of some all, of most something
    let chance = *rng.pick(&[0, 30, 50, 50, 70, 100]);
    for (at, bytes) in &record.fresh {
        for (nth, part) in bytes.chunks(SECTOR).enumerate() {
            if rng.below(100) < chance {
                file.write_all_at(part, at + (nth * SECTOR) as u64).unwrap();
            }
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        for point in [&self.dir, &self.file] {
            let _ = command(&["umount", "-l", point.to_str().unwrap()]).output();
        }
        let _ = self.server.kill(); // with it goes whatever still waits for the disk
        let _ = self.server.wait();
        let _ = fs::remove_file(&self.file);
    }
}

/// Serves one file, mounted on `file`, from a thread of its own until it is unmounted.
fn serve(file: &Path, len: u64, record: Arc<Mutex<Record>>) -> io::Result<()> {
    let dev = dev_fuse::open()?;
    let data = format!("fd={},rootmode=100000,user_id=0,group_id=0,allow_other\0", dev.as_raw_fd());
    let data = std::ffi::CStr::from_bytes_with_nul(data.as_bytes()).unwrap().to_owned();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("imz-power", file, "fuse", flags, &*data)?;
    std::thread::spawn(move || answer_all(&dev, len, &record));
    Ok(())
}

fn answer_all(dev: &OwnedFd, len: u64, record: &Mutex<Record>) {
    let mut bytes = vec![0; WRITE_LEN_MAX as usize + 4096];
    loop {
        let got = match dev_fuse::receive(dev, &mut bytes) {
            Ok(got) => got,
            Err(imz::sys::Errno::INTR | imz::sys::Errno::AGAIN | imz::sys::Errno::NOENT) => {
                continue;
            }
            Err(_) => return, // it is unmounted
        };
        let request = &bytes[..got];
        let (unique, answer) = if let Ok(offer) = Offer::parse(request) {
            let flags = offer.flags & (flag::BIG_WRITES | flag::MAX_PAGES | flag::ASYNC_READ);
            let taken = Taken {
                flags,
                readahead_max: 1 << 17,
                background_max: 16,
                write_len_max: WRITE_LEN_MAX,
                stack_depth: 0,
            };
            (offer.unique, Ok(init::taken(&taken)))
        } else {
            let request = Raw::whole(request).unwrap().parse().unwrap();
            if matches!(request.op, Op::Forget | Op::Interrupt { .. }) {
                continue;
            }
            (request.head.unique, answer(&request.op, len, record))
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let _ = dev_fuse::send(dev, &reply::out_head(unique, error, body.len()), &body);
    }
}

fn answer(op: &Op<'_>, len: u64, record: &Mutex<Record>) -> Result<Vec<u8>, i32> {
    let mut record = record.lock().unwrap();
    match op {
        Op::Getattr | Op::Setattr(_) => {
            let mode = libc::S_IFREG | 0o600;
            let stat = Stat { mode, size: len, nlink: 1, ino: 1, ..Stat::default() };
            Ok(reply::attr(&Entry { ino: 1, stat: &stat, keep: 3600 }))
        }
        Op::Open { .. } => {
            Ok(reply::open(1, OpenFlags { keep_cache: true, ..OpenFlags::default() }))
        }
        Op::Read { at, len: want, .. } => {
            let mut bytes = vec![0; (len.saturating_sub(*at)).min(u64::from(*want)) as usize];
            record.current.read_exact_at(&mut bytes, *at).map_err(|_| libc::EIO)?;
            Ok(bytes)
        }
        Op::Write { at, data, .. } => {
            record.current.write_all_at(data, *at).map_err(|_| libc::EIO)?;
            record.fresh.push((*at, data.to_vec()));
            Ok(reply::size(data.len() as u32))
        }
        Op::Fsync { .. } => {
            let fresh = std::mem::take(&mut record.fresh);
            for (at, bytes) in fresh {
                record.durable.write_all_at(&bytes, at).map_err(|_| libc::EIO)?;
            }
            record.flushes += 1;
            Ok(Vec::new())
        }
        Op::Flush { .. } | Op::Release { .. } | Op::Destroy => Ok(Vec::new()),
        _ => Err(libc::ENOSYS),
    }
}
