//! The way in from the kernel: unpack, call the filter, reply. The only file that names fuser.
//!
//! An operation is tried at once, on the thread that read the request. If it misses, what it
//! wants goes to lento with the operation and its reply in a closure, which is run again when the
//! want is met: no thread waits. Entries and attributes are given to the kernel for good; the
//! [`Kernel`] handle takes them back when a promise is broken. OPENDIR is answered with ENOSYS,
//! so that the kernel opens and lists directories from its own cache.
//! fuser cannot tell flock from fcntl locks, and has no O_TMPFILE: the kernel keeps locks itself.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    AccessFlags, BackingId, BsdFileFlags, Config, CopyFileRangeFlags, FileAttr, FileHandle,
    FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner,
    MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};

use super::attrs::{When, Wish};
use super::filter::{Filter, Found, Result, Stop, as_is};
use super::open::Open;
use crate::kml::record::{Fid, NAME_LEN_MAX, Time};
use crate::sys::cred::Caller;
use crate::sys::fs::{Kind, RenameMode, o};
use crate::sys::{self, Errno};

/// How long the kernel keeps what it was given, unless told: a year.
const KEEP: Duration = Duration::from_secs(365 * 86400);
const NOT: Duration = Duration::ZERO;
/// Fids are never used twice.
const GENERATION: Generation = Generation(0);
/// After so many fetches an operation takes what is here: it changes as fast as it comes.
const FRESH_TRIES_MAX: u32 = 32;
/// After so many it is given up.
const TRIES_MAX: u32 = 64;
/// Largest write request, bytes.
const WRITE_LEN_MAX: u32 = 1 << 20;
/// Requests that the kernel queues in the background.
const BACKGROUND_MAX: u16 = 64;

/// What the mount is to be like.
#[derive(Clone, Debug)]
pub struct Options {
    /// as it stands in the mount table
    pub source: String,
    pub read_only: bool,
    pub allow_other: bool,
    /// fsync waits for the server
    pub sync: bool,
    /// nosuid, nodev, noexec, noatime: as mount(8) has them
    pub flags: Vec<String>,
    /// threads that read requests
    pub threads: usize,
}

/// A mounted session, before and while it runs.
pub struct Mounted {
    session: Session<Fuse>,
    filter: Arc<Filter>,
}

/// Tells the kernel that what it was given is not so any more. Each call may wait for locks that
/// a request holds: never on a thread that requests wait for.
pub struct Kernel {
    notifier: fuser::Notifier,
    dev: OwnedFd,
    /// the kernel can be told to look up every name again (Linux 6.16 and newer)
    pub has_epochs: bool,
}

impl Kernel {
    /// Attributes, data and listing of an object.
    pub fn forget_object(&self, fid: Fid) {
        report(self.notifier.inval_inode(INodeNo(fid.0), 0, 0));
    }

    /// An entry of a directory, or the absence of one.
    pub fn forget_entry(&self, dir: Fid, name: &[u8]) {
        report(self.notifier.inval_entry(INodeNo(dir.0), OsStr::from_bytes(name)));
    }

    /// All entries of all directories, and all absences: each is looked up again when it is used.
    pub fn forget_entries(&self) {
        report(sys::dev_fuse::next_epoch(&self.dev));
    }
}

/// The kernel may have dropped it by itself, or be gone.
fn report(done: io::Result<()>) {
    if let Err(e) = done
        && e.kind() != io::ErrorKind::NotFound
        && e.raw_os_error() != Some(Errno::NODEV.raw_os_error())
    {
        log::debug!("the kernel was not told: {e}");
    }
}

/// Mounts the filter at `mountpoint`. Requests wait until [`Mounted::run`].
///
/// # Errors
/// Whatever mount(2) or fusermount3 says.
pub fn mount(filter: Arc<Filter>, mountpoint: &Path, options: &Options) -> io::Result<Mounted> {
    let fuse = Fuse(Arc::new(Adapter {
        filter: filter.clone(),
        sync: options.sync,
        handles: Mutex::default(),
        backings: Mutex::default(),
    }));
    let mut config = Config::default();
    config.n_threads = Some(options.threads);
    config.clone_fd = true;
    let all = options.allow_other || sys::cred::is_root();
    config.acl = if all { SessionACL::All } else { SessionACL::Owner };
    let session = if sys::cred::is_root() {
        let dev = sys::dev_fuse::open()?;
        sys::dev_fuse::mount(&dev, mountpoint, &options.source, options.read_only, &options.flags)?;
        Session::from_fd(fuse, dev, config.acl, config).inspect_err(|_| {
            let _ = sys::dev_fuse::detach(mountpoint);
        })?
    } else {
        config.mount_options = vec![
            MountOption::FSName(options.source.clone()),
            MountOption::Subtype("imz".into()),
            MountOption::DefaultPermissions,
            if options.read_only { MountOption::RO } else { MountOption::RW },
        ];
        config.mount_options.extend(options.flags.iter().cloned().map(MountOption::CUSTOM));
        Session::new(fuse, mountpoint, &config)?
    };
    Ok(Mounted { session, filter })
}

impl Mounted {
    /// The way back to the kernel.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn kernel(&self) -> io::Result<Kernel> {
        let dev = self.session.as_fd().try_clone_to_owned()?;
        let has_epochs = sys::dev_fuse::next_epoch(&dev).is_ok();
        self.filter.forgets_names.store(has_epochs, Ordering::Relaxed);
        Ok(Kernel { notifier: self.session.notifier(), dev, has_epochs })
    }

    /// Answers requests until the file system is unmounted.
    pub fn run(self) -> io::Result<()> {
        self.session.run()
    }
}

/// One handle that an application has open.
struct Handle {
    open: Arc<Open>,
    writer: bool,
}

struct Adapter {
    filter: Arc<Filter>,
    sync: bool,
    handles: Mutex<Handles>,
    /// the kernel's name for the backing file of an open object
    backings: Mutex<HashMap<Fid, Arc<BackingId>>>,
}

#[derive(Default)]
struct Handles {
    next: u64,
    open: HashMap<u64, Arc<Handle>>,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// An operation and what is done with its result: run until it does not miss.
struct Job<O, R> {
    adapter: Arc<Adapter>,
    op: O,
    reply: R,
    tries: u32,
}

impl<T, O, R> Job<O, R>
where
    T: 'static,
    O: Fn(&Adapter) -> Result<T> + Send + 'static,
    R: FnOnce(&Adapter, std::result::Result<T, Errno>) + Send + 'static,
{
    fn run(mut self) {
        let done = catch_unwind(AssertUnwindSafe(|| match self.tries {
            ..FRESH_TRIES_MAX => (self.op)(&self.adapter),
            _ => as_is(|| (self.op)(&self.adapter)),
        }));
        let result = match done {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(Stop::Errno(e))) => Err(e),
            Ok(Err(Stop::Miss(_))) if self.tries >= TRIES_MAX => Err(Errno::BUSY),
            Ok(Err(Stop::Miss(want))) => {
                self.tries += 1;
                let lento = self.adapter.filter.lento.clone();
                let again = Box::new(move |met: std::result::Result<(), Errno>| match met {
                    Ok(()) => self.run(),
                    Err(e) => (self.reply)(&self.adapter, Err(e)),
                });
                return lento.want(want, again);
            }
            Err(_) => {
                log::error!("an operation panicked; it fails with EIO");
                Err(Errno::IO)
            }
        };
        (self.reply)(&self.adapter, result);
    }
}

/// What fuser calls: one more handle on the adapter, so that closures can keep it.
struct Fuse(Arc<Adapter>);

impl Fuse {
    fn run<T: 'static>(
        &self,
        op: impl Fn(&Adapter) -> Result<T> + Send + 'static,
        reply: impl FnOnce(&Adapter, std::result::Result<T, Errno>) + Send + 'static,
    ) {
        Job { adapter: self.0.clone(), op, reply, tries: 0 }.run();
    }

    /// A sync: with `-o sync` the reply waits for the server, too.
    fn sync(&self, op: impl Fn(&Adapter) -> Result<()> + Send + 'static, reply: ReplyEmpty) {
        self.run(op, move |a, result| match result {
            Ok(()) if a.sync => {
                let last = a.filter.cache.log.last();
                a.filter.lento.when_acked(last, Box::new(move |acked| empty(reply, acked)));
            }
            result => empty(reply, result),
        });
    }
}

impl Adapter {
    fn handle(&self, fh: FileHandle) -> Result<Arc<Handle>> {
        Ok(held(&self.handles).open.get(&fh.0).cloned().ok_or(Errno::BADF)?)
    }

    fn add(&self, open: Arc<Open>, writer: bool) -> FileHandle {
        let mut handles = held(&self.handles);
        handles.next += 1;
        let fh = handles.next;
        handles.open.insert(fh, Arc::new(Handle { open, writer }));
        FileHandle(fh)
    }

    /// The kernel's name for the open file's backing, one an object; `None`: by the daemon then.
    fn backing(
        &self,
        open: &Open,
        register: impl FnOnce() -> io::Result<BackingId>,
    ) -> Option<Arc<BackingId>> {
        if !open.passthrough {
            return None;
        }
        let mut backings = held(&self.backings);
        if let Some(id) = backings.get(&open.fid) {
            return Some(id.clone());
        }
        match register() {
            Ok(id) => {
                let id = Arc::new(id);
                backings.insert(open.fid, id.clone());
                Some(id)
            }
            Err(e) => {
                log::debug!("no passthrough for {}: {e}", open.fid);
                None
            }
        }
    }

    /// Where the daemon always moves the data, and what is here is what the server has.
    fn keeps_pages(&self, open: &Open) -> bool {
        let current = || {
            let meta = self.filter.cache.tree.meta_of(&open.fd);
            meta.is_ok_and(|meta| meta.is_some_and(|meta| self.filter.cache.current(&meta)))
        };
        !self.filter.passthrough.load(Ordering::Relaxed) && current()
    }

    fn close(&self, fh: FileHandle) -> Result<()> {
        let Some(handle) = held(&self.handles).open.remove(&fh.0) else { return Ok(()) };
        // Under the lock that opens take: a new first handle must not find the old backing.
        let mut backings = held(&self.backings);
        let (last, stored) = self.filter.close(&handle.open, handle.writer);
        if last {
            backings.remove(&handle.open.fid);
        }
        drop(backings);
        let (fid, writer) = (handle.open.fid, handle.writer && handle.open.passthrough);
        drop(handle); // it can write, too
        if last && writer {
            self.filter.watch_if_mapped(fid);
        }
        stored
    }
}

fn flags_of(writer: bool, keeps_pages: bool) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    // A reader's close tells us nothing.
    flags.set(FopenFlags::FOPEN_NOFLUSH, !writer);
    // Then the kernel's pages are as good as a promise.
    flags.set(FopenFlags::FOPEN_KEEP_CACHE, keeps_pages);
    flags
}

fn caller(req: &Request, umask: u32) -> Caller {
    Caller { uid: req.uid(), gid: req.gid(), umask }
}

fn errno(e: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(e.raw_os_error())
}

fn attr(found: &Found) -> FileAttr {
    let s = &found.stat;
    FileAttr {
        ino: INodeNo(found.fid.0),
        size: s.size,
        blocks: s.blocks,
        atime: system_time(s.atime),
        mtime: system_time(s.mtime),
        ctime: system_time(s.ctime),
        crtime: system_time(s.btime),
        kind: file_type(s.kind()),
        perm: (s.mode & 0o7777) as u16,
        nlink: s.nlink,
        uid: s.uid,
        gid: s.gid,
        rdev: sys::dev_fuse::encode_dev(s.rdev),
        blksize: 4096,
        flags: 0,
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Dir => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::Char => FileType::CharDevice,
        Kind::Block => FileType::BlockDevice,
    }
}

fn system_time((sec, nsec): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(sec.unsigned_abs());
    let base = if sec < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    base.and_then(|t| t.checked_add(Duration::from_nanos(nsec.into()))).unwrap_or(UNIX_EPOCH)
}

fn when(time: TimeOrNow) -> When {
    match time {
        TimeOrNow::Now => When::Now,
        TimeOrNow::SpecificTime(t) => When::At(match t.duration_since(UNIX_EPOCH) {
            Ok(d) => Time { sec: d.as_secs() as i64, nsec: d.subsec_nanos() },
            // fuser takes the fraction off, too, where the kernel means it to be added
            Err(e) => {
                Time { sec: -(e.duration().as_secs() as i64), nsec: e.duration().subsec_nanos() }
            }
        }),
    }
}

fn entry(reply: ReplyEntry, result: std::result::Result<Found, Errno>) {
    match result {
        Ok(found) => {
            let keep = if found.keep { KEEP } else { NOT };
            reply.entry(&keep, &attr(&found), GENERATION);
        }
        Err(e) => reply.error(errno(e)),
    }
}

fn empty(reply: ReplyEmpty, result: std::result::Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(e)),
    }
}

fn attributes(reply: ReplyAttr, result: std::result::Result<Found, Errno>) {
    match result {
        Ok(found) => reply.attr(if found.keep { &KEEP } else { &NOT }, &attr(&found)),
        Err(e) => reply.error(errno(e)),
    }
}

/// A value of an extended attribute, or its length when the application asks with no room.
fn value(reply: ReplyXattr, room: u32, result: std::result::Result<Option<Vec<u8>>, Errno>) {
    match result {
        Ok(Some(value)) if room == 0 => reply.size(value.len() as u32),
        Ok(Some(value)) if value.len() > room as usize => reply.error(fuser::Errno::ERANGE),
        Ok(Some(value)) => reply.data(&value),
        Ok(None) => reply.error(fuser::Errno::ENODATA),
        Err(e) => reply.error(errno(e)),
    }
}

impl Filesystem for Fuse {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_POSIX_ACL,
            InitFlags::FUSE_DONT_MASK,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_NO_OPENDIR_SUPPORT,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_ASYNC_DIO,
        ];
        for flag in wanted {
            if let Err(missing) = config.add_capabilities(flag) {
                log::info!("the kernel has no {missing:?}");
            }
        }
        let filter = &self.0.filter;
        if filter.passthrough.load(Ordering::Relaxed) {
            let able = sys::cred::is_root()
                && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
                && config.set_max_stack_depth(2).is_ok();
            filter.passthrough.store(able, Ordering::Relaxed);
        }
        let _ = config.set_max_write(WRITE_LEN_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        self.run(
            move |a| match a.filter.lookup(Fid(parent.0), &name) {
                // Inode 0: the kernel may keep the absence, too.
                Err(Stop::Errno(Errno::NOENT)) if a.filter.may_keep_absence(Fid(parent.0)) => {
                    Ok(Found { fid: Fid(0), stat: Default::default(), keep: true })
                }
                result => result,
            },
            |_, result| entry(reply, result),
        );
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.run(move |a| a.filter.getattr(Fid(ino.0)), |_, result| attributes(reply, result));
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let by = caller(req, 0);
        let (atime, mtime) = (atime.map(when), mtime.map(when));
        let wish = Wish { mode, uid, gid, size, atime, mtime };
        self.run(
            move |a| a.filter.setattr(by, Fid(ino.0), wish),
            |_, result| attributes(reply, result),
        );
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        self.run(
            move |a| a.filter.readlink(Fid(ino.0)),
            |_, result| match result {
                Ok(target) => reply.data(&target),
                Err(e) => reply.error(errno(e)),
            },
        );
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let (by, name) = (caller(req, umask), name.as_bytes().to_vec());
        let rdev = sys::dev_fuse::decode_dev(rdev);
        self.run(
            move |a| a.filter.mknod(by, Fid(parent.0), &name, mode, rdev),
            |_, result| entry(reply, result),
        );
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let (by, name) = (caller(req, umask), name.as_bytes().to_vec());
        self.run(
            move |a| a.filter.mkdir(by, Fid(parent.0), &name, mode),
            |_, result| entry(reply, result),
        );
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (by, name) = (caller(req, 0), name.as_bytes().to_vec());
        self.run(
            move |a| a.filter.unlink(by, Fid(parent.0), &name),
            |_, result| empty(reply, result),
        );
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (by, name) = (caller(req, 0), name.as_bytes().to_vec());
        self.run(
            move |a| a.filter.rmdir(by, Fid(parent.0), &name),
            |_, result| empty(reply, result),
        );
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let (by, name) = (caller(req, 0), name.as_bytes().to_vec());
        let target = target.as_os_str().as_bytes().to_vec();
        self.run(
            move |a| a.filter.symlink(by, Fid(parent.0), &name, &target),
            |_, result| entry(reply, result),
        );
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let by = caller(req, 0);
        let (old, new) = (name.as_bytes().to_vec(), newname.as_bytes().to_vec());
        let mode = match flags {
            f if f.is_empty() => RenameMode::Replace,
            f if f == RenameFlags::RENAME_NOREPLACE => RenameMode::NoReplace,
            f if f == RenameFlags::RENAME_EXCHANGE => RenameMode::Exchange,
            _ => return reply.error(fuser::Errno::EINVAL),
        };
        self.run(
            move |a| a.filter.rename(by, (Fid(parent.0), &old), (Fid(newparent.0), &new), mode),
            |_, result| empty(reply, result),
        );
    }

    fn link(
        &self,
        req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let (by, name) = (caller(req, 0), newname.as_bytes().to_vec());
        self.run(
            move |a| a.filter.link(by, Fid(ino.0), Fid(newparent.0), &name),
            |_, result| entry(reply, result),
        );
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let by = caller(req, 0);
        let writer = flags.0 & o::ACCMODE != o::RDONLY;
        self.run(
            move |a| a.filter.open(by, Fid(ino.0), flags.0),
            move |a, result| match result {
                Ok(open) => {
                    let backing = a.backing(&open, || reply.open_backing(&open.fd));
                    let flags = flags_of(writer, a.keeps_pages(&open));
                    let fh = a.add(open, writer);
                    match backing {
                        Some(id) => reply.opened_passthrough(fh, flags, &id),
                        None => reply.opened(fh, flags),
                    }
                }
                Err(e) => reply.error(errno(e)),
            },
        );
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (by, name) = (caller(req, umask), name.as_bytes().to_vec());
        let writer = flags & o::ACCMODE != o::RDONLY;
        self.run(
            move |a| match a.filter.create(by, Fid(parent.0), &name, mode, writer) {
                // Somebody else made it meanwhile: then it is an open, unless that was forbidden.
                Err(Stop::Errno(Errno::EXIST)) if flags & o::EXCL == 0 => {
                    let found = a.filter.lookup(Fid(parent.0), &name)?;
                    Ok((found.clone(), a.filter.open(by, found.fid, flags)?))
                }
                done => done,
            },
            move |a, result| match result {
                Ok((found, open)) => {
                    let backing = a.backing(&open, || reply.open_backing(&open.fd));
                    let flags = flags_of(writer, a.keeps_pages(&open));
                    let fh = a.add(open, writer);
                    let at = attr(&found);
                    match backing {
                        Some(id) => {
                            reply.created_passthrough(&KEEP, &at, GENERATION, fh, flags, &id);
                        }
                        None => reply.created(&KEEP, &at, GENERATION, fh, flags),
                    }
                }
                Err(e) => reply.error(errno(e)),
            },
        );
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.run(
            move |a| a.filter.read(&a.handle(fh)?.open, offset, size),
            |_, result| match result {
                Ok(bytes) => reply.data(&bytes),
                Err(e) => reply.error(errno(e)),
            },
        );
    }

    fn write(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (by, data) = (caller(req, 0), data.to_vec());
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        self.run(
            move |a| a.filter.write(by, &a.handle(fh)?.open, offset, &data, kill),
            |_, result| match result {
                Ok(len) => reply.written(len),
                Err(e) => reply.error(errno(e)),
            },
        );
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.run(
            move |a| {
                let handle = a.handle(fh)?;
                if handle.writer { a.filter.store(&handle.open) } else { Ok(()) }
            },
            |_, result| empty(reply, result),
        );
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.run(move |a| a.close(fh), |_, result| empty(reply, result));
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, _data: bool, reply: ReplyEmpty) {
        self.sync(move |a| a.filter.fsync(&a.handle(fh)?.open), reply);
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        // Entries go straight into the reply, which knows how much fits.
        let reply = Arc::new(Mutex::new(Some(reply)));
        let filling = reply.clone();
        self.run(
            move |a| {
                let mut filling = held(&filling);
                let Some(reply) = filling.as_mut() else { return Ok(()) };
                a.filter.list(Fid(ino.0), offset as i64, |e| {
                    let kind = file_type(e.found.stat.kind());
                    let name = OsStr::from_bytes(&e.name);
                    !reply.add(INodeNo(e.found.fid.0), e.next as u64, kind, name)
                })
            },
            move |_, result| match (held(&reply).take(), result) {
                (Some(reply), Ok(())) => reply.ok(),
                (Some(reply), Err(e)) => reply.error(errno(e)),
                (None, _) => {}
            },
        );
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let reply = Arc::new(Mutex::new(Some(reply)));
        let filling = reply.clone();
        self.run(
            move |a| {
                let mut filling = held(&filling);
                let Some(reply) = filling.as_mut() else { return Ok(()) };
                a.filter.list(Fid(ino.0), offset as i64, |e| {
                    let keep = if e.found.keep { &KEEP } else { &NOT };
                    let name = OsStr::from_bytes(&e.name);
                    let ino = INodeNo(e.found.fid.0);
                    !reply.add(ino, e.next as u64, name, keep, &attr(&e.found), GENERATION)
                })
            },
            move |_, result| match (held(&reply).take(), result) {
                (Some(reply), Ok(())) => reply.ok(),
                (Some(reply), Err(e)) => reply.error(errno(e)),
                (None, _) => {}
            },
        );
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.sync(move |a| a.filter.fsync_dir(Fid(ino.0)), reply);
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let s = self.0.filter.lento.space();
        let (blocks, free) = (s.blocks, s.blocks_free);
        let (files, files_free, block_len) = (s.files, s.files_free, s.block_len);
        reply.statfs(
            blocks,
            free,
            s.blocks_available,
            files,
            files_free,
            block_len,
            NAME_LEN_MAX as u32,
            block_len,
        );
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (by, key, value) = (caller(req, 0), name.as_bytes().to_vec(), value.to_vec());
        self.run(
            move |a| a.filter.setxattr(by, Fid(ino.0), &key, &value, flags as u32),
            |_, result| empty(reply, result),
        );
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let key = name.as_bytes().to_vec();
        self.run(
            move |a| a.filter.getxattr(Fid(ino.0), &key),
            move |_, result| value(reply, size, result),
        );
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.run(
            move |a| a.filter.listxattr(Fid(ino.0)),
            move |_, result| {
                let keys = result.map(|keys| {
                    Some(keys.iter().flat_map(|k| k.iter().copied().chain([0])).collect())
                });
                value(reply, size, keys);
            },
        );
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (by, key) = (caller(req, 0), name.as_bytes().to_vec());
        self.run(
            move |a| a.filter.removexattr(by, Fid(ino.0), &key),
            |_, result| empty(reply, result),
        );
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS); // the kernel checks permissions by itself
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.run(
            move |a| a.filter.fallocate(&a.handle(fh)?.open, mode as u32, offset, length),
            |_, result| empty(reply, result),
        );
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let hole = whence == sys::dev_fuse::SEEK_HOLE;
        self.run(
            move |a| a.filter.seek(&a.handle(fh)?.open, offset.max(0) as u64, hole),
            |_, result| match result {
                Ok(at) => reply.offset(at as i64),
                Err(e) => reply.error(errno(e)),
            },
        );
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        self.run(
            move |a| {
                let (from, to) = (a.handle(fh_in)?, a.handle(fh_out)?);
                a.filter.copy_range((&from.open, offset_in), (&to.open, offset_out), len)
            },
            |_, result| match result {
                Ok(len) => reply.written(len),
                Err(e) => reply.error(errno(e)),
            },
        );
    }
}
