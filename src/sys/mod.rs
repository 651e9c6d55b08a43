//! The few system calls that std lacks. The only room that names rustix and libc.

pub mod cred;
pub mod file;
pub mod fs;

/// The kernel's error numbers.
pub use rustix::io::Errno;
