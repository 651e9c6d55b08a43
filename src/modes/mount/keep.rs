//! Pins and eviction of a mount, for the control socket.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::net::client::Handle;
use crate::net::control::keep::{Begun, Done, Evicted, PinState, Pinned, Wish};
use crate::presto::evictor::Evictor;
use crate::presto::filter::Filter;
use crate::presto::pinner::{Pinner, State};
use crate::replica::pins::{from_hex, to_hex};

/// What keeps data in the cache, and what lets them go.
#[derive(Clone)]
pub struct Keeping {
    pub filter: Arc<Filter>,
    pub pinner: Arc<Pinner>,
    pub evictor: Arc<Evictor>,
}

/// All pins together, for status.
#[derive(Default)]
pub struct Sum {
    pub pins: u64,
    pub objects: u64,
    pub len: u64,
    pub missing: u64,
}

impl Keeping {
    /// # Errors
    /// As pthread_create(3).
    pub fn start(
        filter: &Arc<Filter>,
        handle: &Handle,
        cache_max: Option<u64>,
    ) -> std::io::Result<Keeping> {
        let way = handle.clone();
        let evictor = Evictor::start(filter, cache_max, Box::new(move || way.keep_now()))?;
        Ok(Keeping { filter: filter.clone(), pinner: Pinner::start(filter)?, evictor })
    }

    pub fn sum(&self) -> Sum {
        let mut sum = Sum::default();
        for pin in self.filter.cache.pins.all() {
            let report = self.pinner.report(&pin);
            sum.pins += 1;
            sum.objects += report.objects;
            sum.len += report.len;
            sum.missing += report.missing;
        }
        sum
    }

    /// # Errors
    /// In words for people.
    pub fn answer(&self, wish: &Wish) -> Result<Value, String> {
        let pins = &self.filter.cache.pins;
        let path = |hex: &str| from_hex(hex).ok_or("that is no path".to_owned());
        Ok(match wish {
            Wish::Pin { path: hex, priority } => {
                let path = path(hex)?;
                pins.add(&path, *priority).map_err(|e| format!("the pin cannot be kept: {e}"))?;
                self.pinner.pinned(&path);
                json!(Done { was: true })
            }
            Wish::Unpin { path: hex } => {
                let was = pins.remove(&path(hex)?);
                json!(Done { was: was.map_err(|e| format!("the pin cannot be removed: {e}"))? })
            }
            Wish::Pins => json!(Pinned { pins: self.pins() }),
            Wish::Evict { path: hex } => {
                let number = self.evictor.ask(&path(hex)?);
                json!(Begun { number: number.map_err(|_| "too much is being evicted already")? })
            }
            Wish::Evicted { number } => json!(self.evicted(*number)?),
        })
    }

    fn pins(&self) -> Vec<PinState> {
        let state = |pin| {
            let report = self.pinner.report(&pin);
            let (state, error) = match report.state {
                State::New => ("new", None),
                State::Fetching => ("fetching", None),
                State::Whole => ("whole", None),
                State::Away => ("away", None),
                State::Absent => ("absent", None),
                State::Failed(e) => ("failed", Some(e.to_string())),
            };
            PinState {
                path: readable(&pin.path),
                path_hex: to_hex(&pin.path),
                priority: pin.priority,
                state: state.to_owned(),
                error,
                objects: report.objects,
                bytes: report.len,
                missing_files: report.missing,
                missing_bytes: report.missing_len,
            }
        };
        self.filter.cache.pins.all().into_iter().map(state).collect()
    }

    fn evicted(&self, number: u64) -> Result<Evicted, String> {
        let outcome = self.evictor.outcome(number).ok_or("nothing is evicted by that number")?;
        Ok(Evicted {
            done: outcome.done,
            files: outcome.files,
            bytes: outcome.len,
            kept: outcome.kept_count,
            named: outcome
                .kept
                .iter()
                .map(|(path, why)| (readable(path), why.to_string()))
                .collect(),
        })
    }
}

fn readable(path: &[u8]) -> String {
    match path {
        [] => "/".to_owned(),
        path => String::from_utf8_lossy(path).into_owned(),
    }
}
