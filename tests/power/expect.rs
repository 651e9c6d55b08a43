//! What may be at a path after a power cut, and what must be.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

/// A state of a file that was asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum State {
    Absent,
    /// these bytes, all of them durable when they came under this name
    Whole(Vec<u8>),
    /// these bytes were written over others and not synced: any mixture by blocks, zeros, or shorter;
    /// but bytes before the number are those of before
    Written(usize, Vec<u8>),
}

/// All that may be: the last state that is durable, and those asked for after it.
#[derive(Default)]
pub struct Expect(BTreeMap<String, Vec<State>>);

impl Expect {
    /// From now on it is this, for sure.
    pub fn durable(&mut self, path: &str, state: State) {
        self.0.insert(path.to_owned(), vec![state]);
    }
    /// It was asked to be this.
    pub fn asked(&mut self, path: &str, state: State) {
        self.0.entry(path.to_owned()).or_insert_with(|| vec![State::Absent]).push(state);
    }
    /// The newest state asked for.
    pub fn newest(&self, path: &str) -> Option<&State> {
        self.0.get(path).and_then(|states| states.last())
    }
    /// Paths whose newest state is a file.
    pub fn files(&self) -> Vec<String> {
        let is_file = |states: &Vec<State>| !matches!(states.last(), Some(State::Absent) | None);
        self.0.iter().filter(|(_, it)| is_file(it)).map(|(path, _)| path.clone()).collect()
    }
    pub fn len(&self) -> usize {
        self.0.len()
    }
    /// What is wrong below `root`; what is found there is what is expected from now on.
    pub fn check(&mut self, root: &Path) -> Vec<String> {
        let mut wrong = Vec::new();
        for (path, states) in &mut self.0 {
            let found = match fs::read(root.join(path)) {
                Ok(bytes) => State::Whole(bytes),
                Err(e) if e.kind() == io::ErrorKind::NotFound => State::Absent,
                Err(e) => {
                    wrong.push(format!("{path}: {e}"));
                    continue;
                }
            };
            let first = states.first().cloned().unwrap_or(State::Absent);
            if !states.iter().any(|state| may_be(&first, state, &found)) {
                let told = |state: &State| match state {
                    State::Absent => "absent".to_owned(),
                    State::Whole(bytes) => format!("{} bytes", bytes.len()),
                    State::Written(from, bytes) => format!("{from}..{} not synced", bytes.len()),
                };
                let all: Vec<String> = states.iter().map(told).collect();
                let how = differs(states.last(), &found);
                wrong.push(format!("{path}: is {}, may be {all:?}{how}", told(&found)));
            }
            *states = vec![found];
        }
        wrong
    }
}

/// Where two contents differ, and whether zeros stand there.
fn differs(want: Option<&State>, found: &State) -> String {
    let (Some(State::Whole(want) | State::Written(_, want)), State::Whole(found)) = (want, found)
    else {
        return String::new();
    };
    let other: Vec<usize> =
        (0..want.len().min(found.len())).filter(|at| want[*at] != found[*at]).collect();
    let zeros = other.iter().filter(|at| found[**at] == 0).count();
    match (other.first(), other.last()) {
        (Some(first), Some(last)) => {
            format!("; {} bytes of {first}..={last} differ, {zeros} are zero", other.len())
        }
        _ => String::new(),
    }
}

fn may_be(before: &State, asked: &State, found: &State) -> bool {
    match (asked, found) {
        (State::Written(from, bytes), State::Whole(found)) => {
            let old = if let State::Whole(old) = before { &old[..] } else { &[] };
            let kept = found.len() >= *from && found[..*from] == bytes[..*from];
            let longest = bytes.len().max(old.len());
            let block = |nth: usize, block: &[u8]| {
                let at = nth * 4096;
                let of = |all: &[u8]| {
                    let all = &all[at.min(all.len())..];
                    let end = block.len().min(all.len());
                    block[..end] == all[..end] && block[end..].iter().all(|b| *b == 0)
                };
                of(bytes) || of(old) || block.iter().all(|b| *b == 0)
            };
            // a block where old bytes end may hold them, and zeros or new ones behind
            let ends = from / 4096;
            kept && found.len() <= longest
                && found
                    .chunks(4096)
                    .enumerate()
                    .all(|(nth, it)| block(nth, it) || (nth == ends && *from > 0 && kept))
        }
        (State::Written(..), State::Absent) => matches!(before, State::Absent),
        (asked, found) => asked == found,
    }
}
