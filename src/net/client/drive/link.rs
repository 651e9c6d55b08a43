//! The loop's connection: made, lost, and who is at the other end.

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::{Instant, SystemTime};

use super::{Driver, Link};
use crate::lento::message::{Code, Message};
use crate::net::client::{In, Peer};
use crate::net::conn::{Conn, Lane};
use crate::net::poll::{Stream, Token};
use crate::replica::state::hex;
use crate::sys::clock;

impl Driver {
    pub(super) fn begin_to_connect(&mut self, now: Instant) {
        self.generation += 1;
        match &mut self.peer {
            Peer::Embedded(give) => match give().and_then(Stream::from_unix) {
                Ok(stream) => self.up(stream, now),
                Err(e) => self.lost(&e.to_string(), now),
            },
            // A look-up that is still under way: its answer serves this attempt, too.
            Peer::Tcp(..) if self.resolving => {}
            Peer::Tcp(host, port) => {
                let (shared, at) = (self.shared.clone(), (host.clone(), *port));
                let resolve = move || {
                    let found = (&at.0[..], at.1).to_socket_addrs().map(Iterator::collect);
                    shared.tell(In::Resolved { found });
                };
                let name = "imz-resolver".to_owned();
                match std::thread::Builder::new().name(name).spawn(resolve) {
                    Ok(_) => self.resolving = true,
                    Err(e) => self.lost(&e.to_string(), now),
                }
            }
        }
    }

    /// Tries the addresses one after another.
    pub(super) fn connect(&mut self, mut addrs: Vec<SocketAddr>, now: Instant) {
        let mut why = std::io::Error::other("the name has no address");
        while !addrs.is_empty() {
            let addr = addrs.remove(0);
            let begun = Stream::connect(addr).and_then(|mut stream| {
                self.event_loop.add_stream(&mut stream, Token(self.generation as usize))?;
                Ok(stream)
            });
            match begun {
                Ok(stream) => {
                    self.link = Link::Connecting(stream, addrs);
                    return;
                }
                Err(e) => why = std::io::Error::new(e.kind(), format!("{addr}: {e}")),
            }
        }
        self.failed(&why, now);
    }

    pub(super) fn up(&mut self, mut stream: Stream, now: Instant) {
        let (compress, token) = (!stream.is_local(), Token(self.generation as usize));
        if matches!(stream, Stream::Unix(_))
            && let Err(e) = self.event_loop.add_stream(&mut stream, token)
        {
            return self.lost(&e.to_string(), now);
        }
        self.rate.out = 0;
        self.link = Link::Up(Box::new(Conn::new(stream, compress)));
        self.machine.on_connected(now);
    }

    pub(super) fn on_ready(&mut self, now: Instant) {
        match std::mem::replace(&mut self.link, Link::None) {
            Link::None => {}
            Link::Connecting(stream, addrs) => match stream.connected() {
                Ok(true) => self.up(stream, now),
                Ok(false) => self.link = Link::Connecting(stream, addrs),
                Err(e) if addrs.is_empty() => self.failed(&e, now),
                Err(_) => {
                    drop(stream);
                    self.connect(addrs, now);
                }
            },
            Link::Up(mut conn) => {
                let before = conn.bytes_in();
                let read = conn.read();
                let came = conn.bytes_in() - before;
                let generation = self.generation;
                self.link = Link::Up(conn);
                if came > 0 {
                    self.machine.on_heard(came, now);
                }
                match read {
                    Ok(messages) => {
                        for m in messages {
                            if generation != self.generation || !matches!(self.link, Link::Up(_)) {
                                break; // an effect closed the connection
                            }
                            log::trace!("< {} {}", m.id, m.message.brief());
                            self.machine.on_message(m.id, m.answer, m.message, now);
                            self.turn(now);
                        }
                    }
                    Err(fault) => self.lost(&fault.to_string(), now),
                }
            }
        }
    }

    pub(super) fn send(
        &mut self,
        lane: Lane,
        id: u64,
        answer: bool,
        message: &Message,
        now: Instant,
    ) {
        log::trace!("> {id} {}", message.brief());
        if let Link::Up(conn) = &mut self.link
            && let Err(e) = conn.send(lane, id, answer, message)
        {
            self.lost(&e.to_string(), now);
        }
    }

    pub(super) fn unlink(&mut self) {
        self.link = Link::None;
        self.reads.clear();
        self.conflicts.clear(); // who waits is told by that
        self.listings.clear();
        self.cache.pending().take_back();
        self.cache.end_arriving();
        // Answers of the old connection must not reach the new one.
        self.generation += 1;
    }

    /// It could not be made, or broke. Where the network itself says that there is no way to the
    /// server, nobody needs to wait for another attempt.
    fn failed(&mut self, why: &std::io::Error, now: Instant) {
        if has_no_way(why) {
            self.machine.on_no_way(now);
        }
        self.lost(&why.to_string(), now);
    }

    pub(super) fn on_resolved(&mut self, found: std::io::Result<Vec<SocketAddr>>, now: Instant) {
        self.resolving = false;
        // An answer that comes late serves the attempt that is under way by then.
        if !(self.machine.is_connecting() && matches!(self.link, Link::None)) {
            return;
        }
        match found {
            Ok(addrs) => self.connect(addrs, now),
            Err(e) => {
                self.machine.on_no_way(now);
                self.lost(&e.to_string(), now);
            }
        }
    }

    pub(super) fn lost(&mut self, why: &str, now: Instant) {
        self.note_error(why);
        self.unlink();
        self.machine.on_closed(now);
    }

    pub(super) fn note_error(&self, what: &str) {
        let before = self.shared.facts().last_error.replace(what.to_owned());
        if before.as_deref() == Some(what) {
            log::debug!("{}: {what}", self.shared.server); // said already
        } else {
            log::warn!("{}: {what}", self.shared.server);
        }
        self.shared.changed.notify_all();
    }

    pub(super) fn on_welcomed(
        &mut self,
        (node, volume_id): (u32, [u8; 16]),
        volume: String,
        read_only: bool,
    ) {
        let facts = self.cache.state.facts();
        let id = u128::from_be_bytes(volume_id);
        // while the server is away, what it last said holds
        self.cache.set_read_only(read_only);
        let same = facts.volume == volume && facts.settings.read_only == read_only;
        if (facts.node, facts.volume_id()) == (node, id) && same {
            return;
        }
        let edited = self.cache.state.edit(|facts| {
            (facts.node, facts.volume) = (node, volume);
            facts.settings.read_only = read_only;
            facts.volume_id = hex(id);
        });
        if let Err(e) = edited {
            self.note_error(&e.to_string());
        }
    }

    pub(super) fn on_refused(&mut self, code: Code, what: String) {
        // First what it means: who waits for the first contact is woken by either.
        self.shared.facts().contact.get_or_insert(Err((code, what.clone())));
        self.note_error(&format!("refused: {what}"));
        self.shared.changed.notify_all();
    }

    pub(super) fn set_online(&mut self, online: bool) {
        self.cache.set_online(online);
        let mut facts = self.shared.facts();
        (facts.connected, facts.since) = (online, SystemTime::now());
        (facts.since_at, facts.away_at) = (clock::now(), self.machine.away_at());
        if online {
            facts.contact = Some(Ok(()));
            facts.last_error = None;
            self.cache.news.ring();
            log::info!("{}: connected", self.shared.server);
        }
        self.shared.changed.notify_all();
    }
}

/// The network itself says that the server cannot be reached: it is not merely starting again.
fn has_no_way(why: &std::io::Error) -> bool {
    use std::io::ErrorKind as Kind;
    matches!(
        why.kind(),
        Kind::NetworkUnreachable | Kind::HostUnreachable | Kind::NetworkDown | Kind::TimedOut
    )
}
