//! How many files and sockets this process may have open, and which of its threads goes first.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_allowed_is_used() {
        raise_files();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, maximum);
    }
}
