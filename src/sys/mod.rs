//! The few system calls that std lacks. The only room that names rustix and libc.

pub mod cred;
pub mod daemon;
pub mod dev_fuse;
pub mod file;
pub mod fs;
pub mod fusermount;
pub mod local;
pub mod mount;

/// The kernel's error numbers.
pub use rustix::io::Errno;
