//! How many files and sockets this process may have open, and which of its threads has them and goes
//! first.

use rustix::process::{Resource, Rlimit, getrlimit, setpriority_process, setrlimit};

/// Lifts the limit of open files to what the administrator allows: a server needs one for each
/// client. Most systems start processes with 1,024, for programs that use select(2).
pub fn raise_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        log::warn!("the limit of open files stays at {current:?}: {e}");
    }
}

/// The calling thread goes before what programs do, where that is allowed: for short looks that must
/// not come late.
pub fn go_first() {
    // In Linux a priority is a thread's own.
    if let Err(e) = setpriority_process(None, -15) {
        log::debug!("this thread goes before no other: {e}");
    }
}

/// The calling thread has no descriptors from now on but the first three, and shares none with the
/// others: however long it is kept by the kernel, the process's files close when the others end.
///
/// # Errors
/// The kernel is older than 5.9.
#[allow(unsafe_code)]
pub fn let_go_of_files() -> Result<(), super::Errno> {
    // SAFETY: it takes three numbers. With CLOSE_RANGE_UNSHARE the calling thread gets a table of its
    // own, so that nothing is closed that anybody else has.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3 as libc::c_uint,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_UNSHARE,
        )
    };
    if done == 0 {
        return Ok(());
    }
    let e = std::io::Error::last_os_error();
    Err(super::Errno::from_raw_os_error(e.raw_os_error().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_without_files_leaves_the_others_theirs() {
        use std::io::{Read, Write};
        let (mut out, mut into) = std::io::pipe().unwrap();
        let count = || std::fs::read_dir("/proc/thread-self/fd").unwrap().count();
        let left = std::thread::spawn(move || {
            let_go_of_files().unwrap();
            count()
        });
        // the first three, and the listing itself
        assert!(left.join().unwrap() <= 4 && count() > 4);
        into.write_all(b"x").unwrap();
        out.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn all_that_is_allowed_is_used() {
        raise_files();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, maximum);
    }
}
