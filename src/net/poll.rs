//! The event loop's wait: sockets, wake-ups from other threads, and signals, as events of our own.
//!
//! The only file that names mio and signal-hook. Nothing above it sees what kind of socket a
//! [`Stream`] is. Readiness is edge-triggered: after an event the owner reads or writes until
//! [`io::ErrorKind::WouldBlock`], or comes back by itself; no second event says the same again.
//! Absent on purpose: timers (the machines say when they want to be woken; that is the timeout of
//! [`Loop::wait`], which counts time that the machine sleeps) and buffers (conn.rs).

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, event::Source};

use crate::sys::clock::Alarm;

/// Most events that one wait returns.
const EVENTS_MAX: usize = 256;
const TOKEN_WAKER: mio::Token = mio::Token(usize::MAX);
const TOKEN_SIGNAL: mio::Token = mio::Token(usize::MAX - 1);
const TOKEN_ALARM: mio::Token = mio::Token(usize::MAX - 2);
/// Shorter waits need no alarm: nobody minds when they last a little longer after a sleep.
const ALARM_MIN: Duration = Duration::from_secs(1);

/// The owner's name for a socket in the loop. The three largest numbers are the loop's own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Token(pub usize);

/// What ended a wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// this socket can be read or written, or has failed (then both: the call says how)
    Ready { token: Token, readable: bool, writable: bool },
    /// [`Waker::wake`] was called, once or more often
    Woken,
    /// SIGTERM or SIGINT came
    Terminate,
}

/// Wakes the loop from any thread.
#[derive(Clone, Debug)]
pub struct Waker(Arc<mio::Waker>);

impl Waker {
    /// Ends the wait that is under way, or the next one.
    pub fn wake(&self) {
        if let Err(e) = self.0.wake() {
            log::error!("cannot wake the event loop: {e}");
        }
    }
}

/// Where connections come in.
#[derive(Debug)]
pub enum Listener {
    Tcp(mio::net::TcpListener),
    Unix(mio::net::UnixListener),
}

impl Listener {
    /// # Errors
    /// As bind(2); `AddrInUse` when another process listens there.
    pub fn tcp(addr: SocketAddr) -> io::Result<Listener> {
        let listener = TcpListener::bind(addr)?;
        listener.set_nonblocking(true)?;
        Ok(Listener::Tcp(mio::net::TcpListener::from_std(listener)))
    }
    /// # Errors
    /// As bind(2); a path that exists is in use.
    pub fn unix(path: &Path) -> io::Result<Listener> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Listener::Unix(mio::net::UnixListener::from_std(listener)))
    }
    /// The address that was given, where there is one (port 0 asks the kernel for a free one).
    pub fn addr(&self) -> Option<SocketAddr> {
        match self {
            Listener::Tcp(listener) => listener.local_addr().ok(),
            Listener::Unix(_) => None,
        }
    }
    /// The next connection that waits; `None` when none does.
    ///
    /// # Errors
    /// As accept(2), but for the connection's own failures, which are passed over.
    pub fn accept(&self) -> io::Result<Option<Stream>> {
        loop {
            let got = match self {
                Listener::Tcp(listener) => listener.accept().map(|(s, _)| Stream::Tcp(s)),
                Listener::Unix(listener) => listener.accept().map(|(s, _)| Stream::Unix(s)),
            };
            match got {
                Ok(stream) => {
                    stream.set_up();
                    return Ok(Some(stream));
                }
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => return Err(e),
                },
            }
        }
    }
}

/// A non-blocking byte stream to a peer.
#[derive(Debug)]
pub enum Stream {
    Tcp(mio::net::TcpStream),
    Unix(mio::net::UnixStream),
}

impl Stream {
    /// Begins to connect; a `writable` event says that [`Stream::connected`] has something to say.
    ///
    /// # Errors
    /// As socket(2) and connect(2), as far as they fail at once.
    pub fn connect(addr: SocketAddr) -> io::Result<Stream> {
        let stream = Stream::Tcp(mio::net::TcpStream::connect(addr)?);
        stream.set_up();
        Ok(stream)
    }
    /// Takes over a blocking stream that is connected.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn from_tcp(stream: TcpStream) -> io::Result<Stream> {
        stream.set_nonblocking(true)?;
        let stream = Stream::Tcp(mio::net::TcpStream::from_std(stream));
        stream.set_up();
        Ok(stream)
    }
    /// Takes over a blocking stream that is connected: one end of a pair, for a peer that lives in
    /// the same process, or a control connection.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn from_unix(stream: UnixStream) -> io::Result<Stream> {
        stream.set_nonblocking(true)?;
        Ok(Stream::Unix(mio::net::UnixStream::from_std(stream)))
    }
    /// Two ends that are connected to each other.
    ///
    /// # Errors
    /// As socketpair(2).
    pub fn pair() -> io::Result<(Stream, Stream)> {
        let (a, b) = mio::net::UnixStream::pair()?;
        Ok((Stream::Unix(a), Stream::Unix(b)))
    }
    /// Whether a connection that was begun stands by now.
    ///
    /// # Errors
    /// Why it could not be made.
    pub fn connected(&self) -> io::Result<bool> {
        let (error, peer) = match self {
            Stream::Tcp(s) => (s.take_error()?, s.peer_addr().map(drop)),
            Stream::Unix(s) => (s.take_error()?, s.peer_addr().map(drop)),
        };
        match (error, peer) {
            (Some(e), _) => Err(e),
            (None, Ok(())) => Ok(true),
            (None, Err(e)) if e.kind() == io::ErrorKind::NotConnected => Ok(false),
            (None, Err(e)) => Err(e),
        }
    }
    /// Whether the bytes stay on this machine (compressing them would be lost work).
    pub fn is_local(&self) -> bool {
        match self {
            Stream::Tcp(s) => s.peer_addr().is_ok_and(|a| a.ip().is_loopback()),
            Stream::Unix(_) => true,
        }
    }
    /// For people: who is at the other end.
    pub fn peer(&self) -> String {
        match self {
            Stream::Tcp(s) => match s.peer_addr() {
                Ok(addr) => addr.to_string(),
                Err(_) => "a peer that is gone".into(),
            },
            Stream::Unix(_) => "local".into(),
        }
    }
    fn set_up(&self) {
        if let Stream::Tcp(s) = self {
            // without it an answer would wait for the acknowledgement of the one before
            if let Err(e) = s.set_nodelay(true) {
                log::debug!("TCP_NODELAY: {e}");
            }
        }
    }
    fn source(&mut self) -> &mut dyn Source {
        match self {
            Stream::Tcp(s) => s,
            Stream::Unix(s) => s,
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.read(buf),
            Stream::Unix(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.write(buf),
            Stream::Unix(s) => s.write(buf),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(s) => s.as_fd(),
            Stream::Unix(s) => s.as_fd(),
        }
    }
}

/// The wait itself. A socket leaves it when it is dropped.
pub struct Loop {
    poll: mio::Poll,
    events: mio::Events,
    waker: Waker,
    alarm: Alarm,
    signals: Option<mio::net::UnixStream>,
}

impl Loop {
    /// # Errors
    /// As epoll_create(2), eventfd(2) and timerfd_create(2).
    pub fn new() -> io::Result<Loop> {
        let poll = mio::Poll::new()?;
        let waker = Waker(Arc::new(mio::Waker::new(poll.registry(), TOKEN_WAKER)?));
        let (alarm, events) = (Alarm::new()?, mio::Events::with_capacity(EVENTS_MAX));
        let mut source = SourceFd(&alarm.as_raw_fd());
        poll.registry().register(&mut source, TOKEN_ALARM, Interest::READABLE)?;
        Ok(Loop { poll, events, waker, alarm, signals: None })
    }
    /// A handle that ends this loop's wait from any thread.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }
    /// From here on SIGTERM and SIGINT are events of this loop and no longer end the process.
    ///
    /// # Errors
    /// As sigaction(2) and socketpair(2).
    pub fn take_signals(&mut self) -> io::Result<()> {
        let (mut ours, theirs) = {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            (mio::net::UnixStream::from_std(ours), theirs)
        };
        for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
            signal_hook::low_level::pipe::register(signal, theirs.try_clone()?)?;
        }
        self.poll.registry().register(&mut ours, TOKEN_SIGNAL, Interest::READABLE)?;
        self.signals = Some(ours);
        Ok(())
    }
    /// # Errors
    /// As epoll_ctl(2).
    pub fn add_listener(&self, listener: &mut Listener, token: Token) -> io::Result<()> {
        let source: &mut dyn Source = match listener {
            Listener::Tcp(l) => l,
            Listener::Unix(l) => l,
        };
        self.poll.registry().register(source, mio::Token(token.0), Interest::READABLE)
    }
    /// # Errors
    /// As epoll_ctl(2).
    pub fn add_stream(&self, stream: &mut Stream, token: Token) -> io::Result<()> {
        let both = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(stream.source(), mio::Token(token.0), both)
    }
    /// Waits until something happens or `timeout` has passed (`None`: for ever), and puts what
    /// happened in `out`, which is emptied first.
    ///
    /// # Errors
    /// As epoll_wait(2); an interrupted wait is one without events.
    pub fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Event>) -> io::Result<()> {
        out.clear();
        if let Some(pause) = timeout.filter(|pause| *pause >= ALARM_MIN) {
            self.alarm.set(pause)?;
        }
        // epoll counts milliseconds and mio rounds up: no busy turn just before an instant
        match self.poll.poll(&mut self.events, timeout) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(()),
            other => other?,
        }
        for event in &self.events {
            match event.token() {
                TOKEN_WAKER => out.push(Event::Woken),
                TOKEN_ALARM => {} // the wait has ended, which is all
                TOKEN_SIGNAL => {
                    let mut bytes = [0; 64];
                    if let Some(pipe) = &mut self.signals {
                        while pipe.read(&mut bytes).is_ok_and(|n| n > 0) {}
                    }
                    out.push(Event::Terminate);
                }
                token => {
                    let failed = event.is_error();
                    out.push(Event::Ready {
                        token: Token(token.0),
                        readable: event.is_readable() || event.is_read_closed() || failed,
                        writable: event.is_writable() || event.is_write_closed() || failed,
                    });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(events: &[Event], want: Token) -> (bool, bool) {
        let of = |e: &Event| match *e {
            Event::Ready { token, readable, writable } if token == want => {
                Some((readable, writable))
            }
            _ => None,
        };
        events.iter().find_map(of).unwrap_or_default()
    }

    #[test]
    fn a_wake_from_another_thread_ends_the_wait() {
        let mut l = Loop::new().unwrap();
        let waker = l.waker();
        let thread = std::thread::spawn(move || waker.wake());
        let mut events = Vec::new();
        l.wait(Some(Duration::from_secs(10)), &mut events).unwrap();
        assert_eq!(events, [Event::Woken]);
        thread.join().unwrap();
        l.wait(Some(Duration::from_millis(1)), &mut events).unwrap();
        assert_eq!(events, []);
    }

    #[test]
    fn a_connection_over_loopback_is_accepted_and_read() {
        let mut l = Loop::new().unwrap();
        let mut listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        l.add_listener(&mut listener, Token(0)).unwrap();
        let mut ours = Stream::connect(listener.addr().unwrap()).unwrap();
        l.add_stream(&mut ours, Token(1)).unwrap();
        let (mut events, mut theirs) = (Vec::new(), None);
        for _ in 0..100 {
            l.wait(Some(Duration::from_millis(100)), &mut events).unwrap();
            if ready(&events, Token(0)).0 {
                theirs = listener.accept().unwrap();
            }
            if theirs.is_some() && ours.connected().unwrap() {
                break;
            }
        }
        let mut theirs = theirs.unwrap();
        assert!(theirs.is_local());
        l.add_stream(&mut theirs, Token(2)).unwrap();
        ours.write_all(b"hello").unwrap();
        let mut got = [0; 8];
        let count = loop {
            match theirs.read(&mut got) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    l.wait(Some(Duration::from_secs(1)), &mut events).unwrap();
                }
                other => break other.unwrap(),
            }
        };
        assert_eq!(&got[..count], b"hello");
    }

    #[test]
    fn nobody_listening_is_an_error_of_the_connection() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut l = Loop::new().unwrap();
        let mut stream = Stream::connect(free).unwrap();
        l.add_stream(&mut stream, Token(1)).unwrap();
        let mut events = Vec::new();
        while !ready(&events, Token(1)).1 {
            l.wait(Some(Duration::from_secs(5)), &mut events).unwrap();
        }
        assert_eq!(stream.connected().unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_port_in_use_is_an_error() {
        let taken = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let again = Listener::tcp(taken.addr().unwrap());
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
