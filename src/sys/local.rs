//! Unix sockets: who is at the other end, and a connect that cannot hang.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The process at the other end of a socket, as the kernel says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    pub pid: u32,
    pub uid: u32,
}

/// The effective user id of this process.
pub fn euid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Who called `listen` (seen from a client) or `connect` (seen from a server).
///
/// # Errors
/// The kernel's.
pub fn peer(stream: &UnixStream) -> io::Result<Peer> {
    let seen = rustix::net::sockopt::socket_peercred(stream)?;
    Ok(Peer { pid: seen.pid.as_raw_pid().unsigned_abs(), uid: seen.uid.as_raw() })
}

/// Connects, or fails with `WouldBlock` when the listener is too far behind to take us: a stopped
/// process whose queue is full must not stop those who ask after it.
///
/// # Errors
/// The kernel's; `ConnectionRefused` means that the socket's process is gone.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd: OwnedFd =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}
