//! What people decide about a served volume: how much it may hold, whether it may be changed, and
//! what it is called. Kept in the volume's state file (state.rs), so that a restart knows it.
//!
//! A volume is what its id says, not its name: it may be renamed while it is mounted, and knows the
//! names that it had, by which the caches of its clients still ask for it.
//! Absent here: enforcement. Limits are the ledger's matter, who may change what is the server's.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::state::{State, StateError};
use super::volume::Volume;

/// Most users that have a limit of their own in one volume.
pub const USERS_MAX: usize = 4096;
/// Most names that a volume remembers to have had.
const FORMER_MAX: usize = 16;

/// What a volume may hold; `None`: no limit but the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Quota {
    pub bytes: Option<u64>,
    pub files: Option<u64>,
}

/// A volume's settings.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    pub quota: Quota,
    pub read_only: bool,
    /// by uid: what the files of this user may hold, bytes
    pub users: BTreeMap<u32, u64>,
    /// what the volume was called where the server was started, when it was renamed online
    renamed_from: Option<String>,
    /// names that it had, the newest last
    former: Vec<String>,
}

/// A new limit, or none, or the old one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    #[default]
    Keep,
    Unlimited,
    At(u64),
}

/// Which settings are to change.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Change {
    pub bytes: Limit,
    pub files: Limit,
    pub read_only: Option<bool>,
    pub users: Vec<(u32, Limit)>,
}

impl Limit {
    fn apply(self, to: &mut Option<u64>) {
        match self {
            Limit::Keep => {}
            Limit::Unlimited => *to = None,
            Limit::At(limit) => *to = Some(limit),
        }
    }
}

impl Change {
    /// The settings after it.
    pub fn apply(&self, settings: &Settings) -> Settings {
        let mut settings = settings.clone();
        self.bytes.apply(&mut settings.quota.bytes);
        self.files.apply(&mut settings.quota.files);
        settings.read_only = self.read_only.unwrap_or(settings.read_only);
        for (uid, limit) in &self.users {
            let mut of_user = settings.users.get(uid).copied();
            limit.apply(&mut of_user);
            match of_user {
                Some(limit) => settings.users.insert(*uid, limit),
                None => settings.users.remove(uid),
            };
        }
        settings
    }
    /// The change that leads from anything to just these settings.
    pub fn to(quota: Quota, read_only: bool, users: &BTreeMap<u32, u64>) -> Change {
        let limit = |limit: Option<u64>| limit.map_or(Limit::Unlimited, Limit::At);
        Change {
            bytes: limit(quota.bytes),
            files: limit(quota.files),
            read_only: Some(read_only),
            users: users.iter().map(|(uid, bytes)| (*uid, Limit::At(*bytes))).collect(),
        }
    }
}

impl Settings {
    pub fn is_default(&self) -> bool {
        *self == Settings::default()
    }
    /// Names that the volume had, and has no more.
    pub fn former(&self) -> &[String] {
        &self.former
    }
    fn note_former(&mut self, was: &str, is: &str) {
        self.former.retain(|name| name != was && name != is);
        self.former.push(was.to_owned());
        if self.former.len() > FORMER_MAX {
            self.former.remove(0);
        }
    }
}

/// What a volume is called that the server's command line or configuration calls `given`: so, unless
/// it was renamed online since it was given that same name.
pub(super) fn name_at_start(state: &State, given: &str) -> Result<String, StateError> {
    let facts = state.facts();
    if facts.settings.renamed_from.as_deref() == Some(given) || facts.volume == given {
        return Ok(facts.volume);
    }
    state.edit(|facts| {
        facts.settings.renamed_from = None;
        let was = std::mem::replace(&mut facts.volume, given.to_owned());
        facts.settings.note_former(&was, given);
    })?;
    Ok(given.to_owned())
}

impl Volume {
    pub fn settings(&self) -> Settings {
        self.state.facts().settings
    }
    /// Changes the settings. Durable on return: yes.
    ///
    /// # Errors
    /// The state file cannot be written.
    pub fn change_settings(&mut self, change: &Change) -> Result<Settings, StateError> {
        let settings = change.apply(&self.settings());
        self.state.edit(|facts| facts.settings = settings.clone())?;
        Ok(settings)
    }
    /// Sets just these settings, as a configuration says them; names stay. Durable on return: yes.
    ///
    /// # Errors
    /// As [`Volume::change_settings`].
    pub fn set_settings(&mut self, change: &Change) -> Result<Settings, StateError> {
        let before = self.settings();
        let none = |uid: &u32| (*uid, Limit::Unlimited);
        let mut users: Vec<(u32, Limit)> = before.users.keys().map(none).collect();
        users.extend(&change.users); // of two for one user the later one counts
        let change = Change { users, ..change.clone() };
        if change.apply(&before) == before { Ok(before) } else { self.change_settings(&change) }
    }
    /// Calls it `name` from now on. Durable on return: yes.
    ///
    /// # Errors
    /// The state file cannot be written.
    pub fn set_name(&mut self, name: &str) -> Result<(), StateError> {
        let was = self.name.clone();
        self.state.edit(|facts| {
            let settings = &mut facts.settings;
            settings.renamed_from.get_or_insert_with(|| was.clone());
            settings.note_former(&was, name);
            if settings.renamed_from.as_deref() == Some(name) {
                settings.renamed_from = None;
            }
            facts.volume = name.to_owned();
        })?;
        self.name = name.to_owned();
        Ok(())
    }
    /// What the files of a user may hold, bytes; `None`: as much as the volume.
    pub fn user_quota(&self, uid: u32) -> Option<u64> {
        self.settings().users.get(&uid).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_changes_what_it_names() {
        let at = Limit::At;
        let change = Change { bytes: at(9), users: vec![(7, at(1)), (8, at(2))], ..<_>::default() };
        let settings = change.apply(&Settings::default());
        assert_eq!((settings.quota.bytes, settings.quota.files), (Some(9), None));
        let users = vec![(7, Limit::Unlimited), (8, Limit::Keep), (9, Limit::Unlimited)];
        let change = Change { files: at(3), read_only: Some(true), users, ..<_>::default() };
        let settings = change.apply(&settings);
        assert_eq!((settings.quota.bytes, settings.quota.files), (Some(9), Some(3)));
        assert_eq!(settings.users.into_iter().collect::<Vec<_>>(), [(8, 2)]);
        assert!(settings.read_only);
    }

    #[test]
    fn settings_and_names_survive_a_restart() {
        let at = tempfile::tempdir().unwrap();
        let dir = at.path().join("v");
        std::fs::create_dir(&dir).unwrap();
        let open = |name: &str| Volume::open(&dir, None, name).unwrap();
        let mut volume = open("a");
        let users = vec![(1000, Limit::At(5))];
        let change = Change { bytes: Limit::At(77), users, ..<_>::default() };
        volume.change_settings(&change).unwrap();
        volume.set_name("b").unwrap();
        volume.set_name("c").unwrap();
        drop(volume); // as after a kill
        let mut volume = open("a");
        assert_eq!(volume.name(), "c", "renamed since it was called so");
        assert_eq!(volume.settings().quota.bytes, Some(77));
        assert_eq!((volume.user_quota(1000), volume.user_quota(1001)), (Some(5), None));
        assert_eq!(volume.settings().former(), ["a", "b"]);
        volume.set_settings(&Change::to(Quota::default(), true, &BTreeMap::new())).unwrap();
        assert!(volume.settings().users.is_empty() && volume.settings().read_only);
        drop(volume);
        let volume = open("d");
        assert_eq!(volume.name(), "d", "what the server is told anew holds");
        assert_eq!(volume.settings().former(), ["a", "b", "c"]);
        drop(volume);
        let mut volume = open("d");
        volume.set_name("e").unwrap();
        volume.set_name("d").unwrap();
        drop(volume);
        assert_eq!(open("x").name(), "x");
    }
}
