//! The way in from the kernel: a mount, and the threads that read requests from /dev/fuse.
//!
//! ```text
//!  mount --> handshake (INIT) --> run: read, serve, read, ... --> unmounted: ENODEV
//! ```
//!
//! Each thread has a descriptor of its own, where the kernel allows it. An answer goes to the
//! descriptor from which its request was read, from whatever thread. Notices to the kernel go the
//! same way as answers. Root mounts by mount(2), others by fusermount3. Where the kernel's module
//! allows it and root mounts, requests come over io_uring instead (`rings`), and what is left for
//! the threads here are forgotten objects and interrupts.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::abi::init::{self, Offer, Taken, flag};
use super::abi::{Head, Raw, reply};
use super::adapter::{Adapter, Ways};
use super::filter::Filter;
use super::parked::{Ticket, Way};
use super::rings::Rings;
use crate::kml::record::Fid;
use crate::sys::{self, Errno, dev_fuse, fusermount};

/// Largest write request, bytes.
const WRITE_LEN_MAX: u32 = 1 << 20;
/// Room for a request: the largest write, its head, and what else may be long.
const REQUEST_LEN_MAX: usize = WRITE_LEN_MAX as usize + (8 << 10);
/// Requests that the kernel queues in the background.
const BACKGROUND_MAX: u16 = 64;
/// File systems that a backing file may be stacked on: 1, and 2 for one in an overlay.
const STACK_DEPTH: u32 = 2;

/// Whether requests come over io_uring.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Uring {
    /// where the kernel offers it, and root mounts
    #[default]
    Auto,
    /// or there is no mount
    On,
    Off,
}

/// What the mount is to be like.
#[derive(Clone, Debug)]
pub struct Options {
    /// as it stands in the mount table
    pub source: String,
    pub read_only: bool,
    pub allow_other: bool,
    /// nosuid, nodev, noexec, noatime: as mount(8) has them
    pub flags: Vec<String>,
    /// threads that read requests
    pub threads: usize,
    pub ways: Ways,
    pub uring: Uring,
}

/// A mounted session, before and while it runs.
pub struct Mounted {
    dev: Arc<OwnedFd>,
    adapter: Arc<Adapter>,
    threads: usize,
    rings: Option<Rings>,
}

/// Tells the kernel that what it was given is not so any more. Each call may wait for locks that
/// a request holds: never on a thread that requests wait for.
pub struct Kernel {
    dev: Arc<OwnedFd>,
    /// the kernel can be told to look up every name again (Linux 6.16 and newer)
    pub has_epochs: bool,
}

impl Kernel {
    /// Attributes, data and listing of an object.
    pub fn forget_object(&self, fid: Fid) {
        self.tell(&reply::inval_inode(fid.0));
    }

    /// All entries of all directories, and all absences: each is looked up again when it is used.
    pub fn forget_entries(&self) {
        self.tell(&reply::next_epoch());
    }

    fn tell(&self, notice: &[u8]) {
        match dev_fuse::send(&self.dev, notice, &[]) {
            // The kernel may have dropped it by itself, or be gone.
            Ok(()) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(e) => log::debug!("the kernel was not told: {e}"),
        }
    }
}

/// Mounts the filter at `mountpoint`, and agrees with the kernel on how to speak. Requests wait
/// until [`Mounted::run`].
///
/// # Errors
/// Whatever mount(2) or fusermount3 says; a kernel that is too old.
pub fn mount(filter: Arc<Filter>, mountpoint: &Path, options: &Options) -> io::Result<Mounted> {
    let dev = Arc::new(if sys::cred::is_root() {
        let dev = dev_fuse::open()?;
        dev_fuse::mount(&dev, mountpoint, &options.source, options.read_only, &options.flags)?;
        dev
    } else {
        fusermount::mount(mountpoint, &helper_options(options))?
    });
    let shaken = shake_hands(&dev, &filter, options).and_then(|rings| {
        let adapter = Adapter::new(filter, dev.clone(), options.ways);
        adapter.start()?;
        Ok(Mounted { dev, adapter, threads: options.threads.max(1), rings })
    });
    shaken.inspect_err(|_| {
        let _ = sys::mount::umount(mountpoint, true); // it is of no use to anybody
    })
}

fn helper_options(options: &Options) -> Vec<String> {
    let mut words = vec![
        format!("fsname={}", fusermount::escaped(&options.source)),
        "subtype=imz".to_owned(),
        "default_permissions".to_owned(),
        if options.read_only { "ro" } else { "rw" }.to_owned(),
    ];
    if options.allow_other {
        words.push("allow_other".to_owned());
    }
    words.extend(options.flags.iter().cloned());
    words
}

/// Reads INIT and answers it; with the rings over which requests will come.
fn shake_hands(
    dev: &Arc<OwnedFd>,
    filter: &Filter,
    options: &Options,
) -> io::Result<Option<Rings>> {
    let mut buffer = vec![0; REQUEST_LEN_MAX];
    loop {
        let len = match dev_fuse::receive(dev, &mut buffer) {
            Err(Errno::INTR) => continue,
            done => done?,
        };
        let offer = Offer::parse(&buffer[..len]).map_err(|_| {
            io::Error::other("the kernel's FUSE is too old: Linux 5.4 or newer is needed")
        })?;
        let answer =
            |body: &[u8]| dev_fuse::send(dev, &reply::out_head(offer.unique, 0, body.len()), body);
        if offer.major > init::MAJOR {
            answer(&init::older())?; // and it offers again
            continue;
        }
        let rings = rings_for(&offer, dev, options.uring)?;
        answer(&init::taken(&take(&offer, filter, options, rings.is_some())))?;
        return Ok(rings);
    }
}

/// Rings, where they are wanted, offered and possible.
fn rings_for(offer: &Offer, dev: &Arc<OwnedFd>, uring: Uring) -> io::Result<Option<Rings>> {
    if uring == Uring::Off {
        return Ok(None);
    }
    let rings = if !sys::cred::is_root() {
        Err(io::Error::other("only root can have it"))
    } else if offer.flags & flag::OVER_IO_URING == 0 {
        Err(io::Error::other(
            "the kernel does not offer it (Linux 6.14 and newer do, after: \
             echo Y > /sys/module/fuse/parameters/enable_uring)",
        ))
    } else {
        Rings::new(dev, WRITE_LEN_MAX as usize)
    };
    match rings {
        Ok(rings) => Ok(Some(rings)),
        Err(e) if uring == Uring::On => {
            Err(io::Error::new(e.kind(), format!("there is no FUSE over io_uring ({e})")))
        }
        Err(e) => {
            log::info!("no FUSE over io_uring ({e})");
            Ok(None)
        }
    }
}

/// What we take of the kernel's offer.
fn take(offer: &Offer, filter: &Filter, options: &Options, rings: bool) -> Taken {
    let mut wanted = flag::INIT_EXT
        | flag::ASYNC_READ
        | flag::ATOMIC_O_TRUNC
        | flag::BIG_WRITES
        | flag::DONT_MASK
        | flag::DO_READDIRPLUS
        | flag::READDIRPLUS_AUTO
        | flag::ASYNC_DIO
        | flag::PARALLEL_DIROPS
        | flag::POSIX_ACL
        | flag::MAX_PAGES
        | flag::CACHE_SYMLINKS
        | flag::NO_OPENDIR_SUPPORT
        | flag::HANDLE_KILLPRIV_V2;
    if options.ways.locks {
        wanted |= flag::POSIX_LOCKS | flag::FLOCK_LOCKS;
    }
    if rings {
        wanted |= flag::OVER_IO_URING;
    }
    if filter.passthrough.load(Ordering::Relaxed) && sys::cred::is_root() {
        wanted |= flag::PASSTHROUGH;
    }
    let flags = wanted & offer.flags;
    if flags != wanted {
        log::info!("the kernel lacks what these flags of FUSE mean: {:x}", wanted & !flags);
    }
    let passthrough = flags & flag::PASSTHROUGH != 0;
    filter.passthrough.store(passthrough, Ordering::Relaxed);
    Taken {
        flags,
        readahead_max: offer.readahead_max,
        background_max: BACKGROUND_MAX,
        write_len_max: WRITE_LEN_MAX,
        stack_depth: if passthrough { STACK_DEPTH } else { 0 },
    }
}

impl Mounted {
    /// The way back to the kernel.
    pub fn kernel(&self) -> Kernel {
        let has_epochs = dev_fuse::send(&self.dev, &reply::next_epoch(), &[]).is_ok();
        self.adapter.filter.forgets_names.store(has_epochs, Ordering::Relaxed);
        Kernel { dev: self.dev.clone(), has_epochs }
    }

    /// Answers requests until the file system is unmounted.
    ///
    /// # Errors
    /// Requests cannot be read any more, though nobody unmounted.
    pub fn run(self) -> io::Result<()> {
        let rings = self.rings.map(|rings| rings.start(&self.adapter)).transpose()?;
        let mut others = Vec::new();
        for _ in 1..self.threads {
            // Not everybody may open /dev/fuse; then all read from one descriptor.
            let own = dev_fuse::clone_of(self.dev.as_fd());
            let dev = own.map_or_else(|_| self.dev.clone(), Arc::new);
            let adapter = self.adapter.clone();
            let thread = std::thread::Builder::new().name("fuse".into());
            others.push(thread.spawn(move || serve(&adapter, dev))?);
        }
        let mut ended = serve(&self.adapter, self.dev);
        for thread in others {
            let other = thread.join().unwrap_or_else(|_| Err(io::Error::other("it panicked")));
            ended = ended.and(other);
        }
        if let Some(rings) = rings {
            rings.stop();
        }
        ended
    }
}

/// A descriptor on which requests come and answers go.
struct Channel(Arc<OwnedFd>);

impl Way for Channel {
    fn send(&self, unique: u64, _slot: u32, result: Result<Vec<u8>, Errno>) {
        let (error, body) = match result {
            Ok(body) => (0, body),
            Err(e) => (-e.raw_os_error(), Vec::new()),
        };
        match dev_fuse::send(&self.0, &reply::out_head(unique, error, body.len()), &body) {
            // The kernel may have given the request up, or the whole mount.
            Ok(()) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(e) => log::error!("an answer of {} bytes was not taken: {e}", body.len()),
        }
    }
}

/// Reads requests and serves them until the file system is unmounted.
fn serve(adapter: &Arc<Adapter>, dev: Arc<OwnedFd>) -> io::Result<()> {
    let way: Arc<dyn Way> = Arc::new(Channel(dev.clone()));
    let mut buffer = vec![0; REQUEST_LEN_MAX];
    loop {
        let len = match dev_fuse::receive(&dev, &mut buffer) {
            Ok(len) => len,
            Err(Errno::NODEV) => return Ok(()),
            // Nothing came, or it was given up while it was read.
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
            Err(e) => return Err(e.into()),
        };
        let bytes = &buffer[..len];
        match (Raw::whole(bytes), Head::parse(bytes)) {
            (Ok(raw), Ok(head)) => adapter.serve(raw, Ticket::new(head.unique, 0, way.clone())),
            (Err(e), Ok(head)) => {
                log::error!("{e}");
                drop(Ticket::new(head.unique, 0, way.clone())); // EIO
            }
            (_, Err(e)) => log::error!("{e}: it has {len} bytes"),
        }
    }
}
