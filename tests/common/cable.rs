//! A cable between one client and the server, which a test can cut, and mend, and make slow.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub struct Cable {
    port: u16,
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    cut: AtomicBool,
    /// bytes a second in each direction; 0: as fast as it goes
    rate: AtomicU64,
    streams: Mutex<Vec<TcpStream>>,
}

impl Cable {
    /// To the server at this port of this machine.
    pub fn to(server: u16) -> Cable {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let inner = Arc::new(Inner::default());
        let shared = inner.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                if shared.cut.load(Ordering::SeqCst) {
                    continue; // dropped: the connection ends
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", server)) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let shared = shared.clone();
                    std::thread::spawn(move || carry(from, to, &shared));
                }
                shared.streams.lock().unwrap().extend([client, server]);
            }
        });
        Cable { port, inner }
    }

    /// As `imz mount` takes it.
    pub fn source(&self) -> String {
        format!("127.0.0.1:{}:/{}", self.port, super::VOLUME)
    }

    pub fn cut(&self) {
        self.inner.cut.store(true, Ordering::SeqCst);
        for stream in self.inner.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both); // it may have ended
        }
    }

    pub fn mend(&self) {
        self.inner.cut.store(false, Ordering::SeqCst);
    }

    /// Bytes a second in each direction; 0: as fast as it goes.
    pub fn limit(&self, rate: u64) {
        self.inner.rate.store(rate, Ordering::SeqCst);
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, inner: &Inner) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(len @ 1..) = from.read(&mut bytes) {
        let rate = inner.rate.load(Ordering::SeqCst);
        if rate > 0 {
            std::thread::sleep(Duration::from_secs_f64(len as f64 / rate as f64));
        }
        if to.write_all(&bytes[..len]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both); // it may have ended
}
