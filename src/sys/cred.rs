//! Acting as the caller of an operation, on one thread.
//!
//! Objects are created with the caller's fsuid, fsgid and umask, so that ownership, set-gid
//! directories, umask and default ACLs come out as on the bare file system. The capabilities of
//! root are kept meanwhile: the kernel has checked the permissions of a request already.
//! Source: the user-space NFS servers; libfuse's passthrough example creates as root instead and
//! fails hundreds of cases of a POSIX suite.

use std::cell::Cell;

use rustix::fs::Mode;
use rustix::thread::{CapabilitiesSecureBits, UnshareFlags};

thread_local! {
    static PREPARED: Cell<bool> = const { Cell::new(false) };
}

/// Who asks: as a FUSE request or a journal record says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    pub umask: u32,
}

/// True when this process may act as any user.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// This process's user and group.
pub fn own() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

/// Runs `act` with the caller's ownership and umask, on this thread alone. Without root the
/// process's own user stays, as the kernel would have it.
pub fn as_caller<T>(caller: Caller, act: impl FnOnce() -> T) -> T {
    prepare();
    rustix::process::umask(Mode::from_bits_truncate(caller.umask));
    if (caller.uid, caller.gid) == (0, 0) || !is_root() {
        return act();
    }
    let back = Back;
    set(caller.uid, caller.gid);
    let result = act();
    drop(back);
    result
}

/// Gives the thread back to root, also when `act` panics.
struct Back;

impl Drop for Back {
    fn drop(&mut self) {
        set(0, 0);
    }
}

#[allow(unsafe_code)]
fn set(uid: u32, gid: u32) {
    // SAFETY: both calls change two numbers of the calling thread's credentials and cannot fail
    // with CAP_SETUID and CAP_SETGID; the group goes first, as it needs no user.
    unsafe {
        libc::syscall(libc::SYS_setfsgid, gid as libc::c_ulong);
        libc::syscall(libc::SYS_setfsuid, uid as libc::c_ulong);
    }
}

/// A umask of the thread's own, and capabilities that stay when the fsuid changes.
fn prepare() {
    if PREPARED.get() {
        return;
    }
    PREPARED.set(true);
    // The umask belongs to the "fs" part of a process, which threads share until they ask not to.
    #[allow(unsafe_code)]
    // SAFETY: unsharing CLONE_FS gives this thread a copy of umask, root and working directory;
    // nothing in this process changes them elsewhere and expects to see it here.
    let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) };
    if let Err(e) = unshared {
        log::warn!("umask is shared between threads: unshare: {e}");
    }
    if is_root() {
        let keep = CapabilitiesSecureBits::NO_SETUID_FIXUP;
        if let Err(e) = rustix::thread::set_capabilities_secure_bits(keep) {
            log::warn!("capabilities are lost when acting as a user: prctl: {e}");
        }
    }
}
