//! Going on in the background, signals, limits: what a daemon needs of the kernel.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// Who comes out of [`fork`].
pub enum Forked {
    /// the process that was started by the user
    Parent(Hearer),
    /// the one that goes on
    Child(Teller),
}

/// The child's end: says once how the start went.
pub struct Teller(File);

/// The parent's end.
pub struct Hearer(File);

impl Teller {
    /// All is well: the parent returns success.
    pub fn ready(mut self) {
        // A parent that is gone needs no answer.
        let _ = self.0.write_all(&[0]);
    }

    /// The parent prints this and ends with this exit code.
    pub fn failed(mut self, exit: u8, what: &str) {
        let _ = self.0.write_all(&[exit]);
        let _ = self.0.write_all(what.as_bytes());
    }
}

impl Hearer {
    /// Waits for the child's word: `Err((exit code, why))` when it could not start.
    pub fn wait(mut self) -> Result<(), (u8, String)> {
        let mut said = Vec::new();
        if let Err(e) = self.0.read_to_end(&mut said) {
            return Err((1, e.to_string()));
        }
        match said.split_first() {
            Some((0, _)) => Ok(()),
            Some((exit, what)) => Err((*exit, String::from_utf8_lossy(what).into_owned())),
            None => Err((1, "the background process died while it started".to_owned())),
        }
    }
}

/// Splits off a process for the background, in a session of its own. The caller must have no
/// other thread.
#[allow(unsafe_code)]
pub fn fork() -> io::Result<Forked> {
    let (read, write) = io::pipe()?;
    let (read, write) = (File::from(OwnedFd::from(read)), File::from(OwnedFd::from(write)));
    // SAFETY: the process has one thread, as the caller promises, so the child may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(read);
            rustix::process::setsid()?;
            std::env::set_current_dir("/")?;
            Ok(Forked::Child(Teller(write)))
        }
        _ => Ok(Forked::Parent(Hearer(read))),
    }
}

/// Puts standard input and output to /dev/null, and standard error at the end of `log`.
pub fn leave_terminal(log: &Path) -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let log = File::options().create(true).append(true).open(log)?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(&log)?)
}

/// Allows as many open files as the system lets this process have.
pub fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(e) = setrlimit(Resource::Nofile, raised) {
        log::debug!("the limit of open files stays at {:?}: {e}", limit.current);
    }
}

/// This machine's name, for people.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The signals that end a daemon, as something to wait for.
pub struct Signals(File);

impl Signals {
    /// From now on SIGTERM, SIGINT and SIGHUP wait to be read here. Call it before any thread is
    /// started: threads inherit it.
    #[allow(unsafe_code)]
    pub fn take() -> io::Result<Signals> {
        // SAFETY: the set is a plain value on this stack, filled before it is used; signalfd
        // returns a descriptor of our own.
        let fd = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(&mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            libc::signalfd(-1, &set, libc::SFD_CLOEXEC)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd just returned it, and nobody else has it.
        Ok(Signals(unsafe { File::from_raw_fd(fd) }))
    }

    /// Waits for the next one.
    pub fn wait(&mut self) -> io::Result<()> {
        let mut info = [0; 128];
        debug_assert!(self.0.as_raw_fd() >= 0);
        self.0.read(&mut info).map(drop)
    }
}
