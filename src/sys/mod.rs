//! The few system calls that std lacks. The only room that names rustix, libc and
//! io_uring.

pub mod boot;
pub mod clock;
pub mod crash;
pub mod cred;
pub mod daemon;
pub mod dev_fuse;
pub mod file;
pub mod fs;
pub mod fusermount;
pub mod limit;
pub mod local;
pub mod mount;
pub mod ring;

/// The kernel's error numbers.
pub use rustix::io::Errno;
