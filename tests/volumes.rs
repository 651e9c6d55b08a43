//! `imz volume` and a server's configuration, through the binary: volumes come, go and change while
//! clients have them mounted. Needs root and /dev/fuse for the mounts.

#![allow(clippy::unwrap_used)] // tests: it is the message

mod common;

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Disk, Mount, imz, imz_fails, imz_run, wait_for};
use serde_json::Value;

/// A server; killed when dropped.
struct Server {
    child: Child,
    port: u16,
    said: Arc<Mutex<String>>,
}

impl Server {
    /// `words` as after `imz serve`; a port is chosen.
    fn start(words: &[&str]) -> Server {
        let mut command = Command::new(imz());
        command.arg("serve").args(words).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let said = Arc::new(Mutex::new(String::new()));
        let to = said.clone();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                to.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        let mut server = Server { child, port: 0, said };
        wait_for("the server says where it serves", 20, || {
            let ended = server.child.try_wait().unwrap();
            assert!(ended.is_none(), "it ended: {}", server.said());
            let said = server.said();
            let found = said.split_once(" on 127.0.0.1:").map(|(_, rest)| rest);
            let port = found.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
            server.port = port.unwrap_or(0);
            port.is_some()
        });
        // the sockets come last
        wait_for("the server answers", 20, || imz_run(&server.args(&["list"])).0 == 0);
        server
    }
    fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }
    fn args(&self, words: &[&str]) -> Vec<OsString> {
        let pid = self.child.id().to_string();
        let words = words.iter().map(|word| word.to_string());
        ["volume".to_owned()]
            .into_iter()
            .chain(words)
            .chain(["--server".to_owned(), pid])
            .map(OsString::from)
            .collect()
    }
    /// `imz volume` at this server; what it said.
    #[track_caller]
    fn volume(&self, words: &[&str]) -> String {
        let (code, said) = imz_run(&self.args(words));
        assert_eq!(code, 0, "{words:?}: {said}");
        said
    }
    #[track_caller]
    fn refuses(&self, words: &[&str], code: i32, part: &str) {
        imz_fails(&self.args(words), code, part);
    }
    fn list(&self) -> Vec<Value> {
        let json = self.volume(&["list", "--json"]);
        serde_json::from_str::<Value>(&json).unwrap().as_array().unwrap().clone()
    }
    #[track_caller]
    fn of(&self, name: &str) -> Value {
        let all = self.list();
        let found = all.iter().find(|volume| volume["name"] == name);
        found.unwrap_or_else(|| panic!("no {name} in {all:?}")).clone()
    }
    fn source(&self, name: &str) -> String {
        format!("127.0.0.1:{}:/{name}", self.port)
    }
    fn stop(&mut self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").arg(pid).status().unwrap().success());
        let until = Instant::now() + Duration::from_secs(20);
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < until, "it does not end: {}", self.said());
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(self.child.wait().unwrap().success(), "{}", self.said());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the server said:\n{}", self.said());
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Directories on a disk that carries attributes.
fn dirs(disk: &Disk, names: &[&str]) -> Vec<PathBuf> {
    names.iter().map(|name| disk.dir(name)).collect()
}

fn errno(result: std::io::Result<()>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

const EROFS: Option<i32> = Some(30);
const FREE: &str = "127.0.0.1:0";

#[test]
fn a_volume_is_created_mounted_renamed_and_removed_while_others_are_used() {
    let Some(disk) = Disk::for_trees() else { return };
    let [one, two] = &dirs(&disk, &["one", "two"])[..] else { panic!() };
    std::fs::write(two.join("there"), "before").unwrap();
    let mut server = Server::start(&["--listen", FREE, text(one)]);
    let first = Mount::with(server.source("one"), &disk.dir("c1"), "age=0");
    std::fs::write(first.at("f"), "one").unwrap();

    let said =
        server.volume(&["create", "two", text(two), "--quota", "200M", "--quota-files", "9"]);
    assert!(said.contains("until the server ends") && said.contains("two="), "{said}");
    server.refuses(&["create", "two", text(&disk.dir("x"))], 4, "a volume two already");
    server.refuses(&["create", "three", text(two)], 4, "in one volume only");
    server.refuses(&["create", "three", text(&two.join("below"))], 5, "no such directory");
    server.refuses(&["create", "a/b", text(two)], 2, "no slash");
    let found = server.of("two");
    assert_eq!((&found["quota_bytes"], &found["quota_files"]), (&(200 << 20).into(), &9.into()));
    assert_eq!((&found["mode"], &found["clients"]), (&"rw".into(), &0.into()));
    let table = server.volume(&["list"]);
    assert!(table.contains("200.00 MiB, 9 files"), "{table}");

    let mut second = Mount::with(server.source("two"), &disk.dir("c2"), "age=0");
    assert_eq!(std::fs::read_to_string(second.at("there")).unwrap(), "before");
    std::fs::write(second.at("new"), "new").unwrap();
    second.sync();
    assert_eq!(std::fs::read_to_string(two.join("new")).unwrap(), "new");

    // who is there is told, by directory too
    let status = || -> Value {
        let (code, json) = imz_run(&["status", "--json", text(two)]);
        assert_eq!(code, 0, "{json}");
        serde_json::from_str(&json).unwrap()
    };
    wait_for("the client is told of", 10, || status()["clients"][0]["permit"] == "write");
    let status = status();
    assert_eq!((&status["volume"], &status["client_count"]), (&"two".into(), &1.into()));
    let client = &status["clients"][0];
    assert_eq!((&client["connected"], &client["permit"]), (&true.into(), &"write".into()));
    assert!(client["host"].is_string() && client["since"].as_str().unwrap().ends_with('Z'));
    let (_, shown) = imz_run(&["status", text(two)]);
    assert!(shown.contains("may change all"), "{shown}");

    // renamed while it is mounted: nobody notices, and the cache finds it by its old name
    server.volume(&["rename", "two", "zwei"]);
    server.refuses(&["rename", "zwei", "one"], 4, "a volume one already");
    server.refuses(&["rename", "two", "x"], 5, "no volume two");
    std::fs::write(second.at("newer"), "newer").unwrap();
    second.sync();
    second.kill();
    second.umount_dead();
    second.again();
    wait_for("the mount is back", 20, || second.is_connected());
    assert_eq!(second.status()["volume"], "zwei");
    assert_eq!(std::fs::read_to_string(second.at("newer")).unwrap(), "newer");

    // and after another life of the server, whose command line says the old name
    let port = format!("127.0.0.1:{}", server.port);
    server.volume(&["set", "zwei", "--user-quota", "1000=5M", "--quota-files", "none"]);
    server.stop();
    let was = format!("two={}", text(two));
    server = Server::start(&["--listen", &port, text(one), &was]);
    let found = server.of("zwei");
    assert_eq!((&found["quota_bytes"], &found["quota_files"]), (&(200 << 20).into(), &Value::Null));
    assert_eq!(found["users"][0]["uid"], 1000);
    assert!(server.volume(&["list", "--users"]).contains("zwei: user 1000 may have 5.00 MiB"));
    wait_for("the mounts are back", 20, || first.is_connected() && second.is_connected());
    std::fs::write(second.at("newest"), "newest").unwrap();
    second.sync();

    // what was granted stays written down: who is away writes on by it
    let granted = || {
        let book = std::fs::read(two.join(".imz/grants.json")).unwrap();
        let book: Value = serde_json::from_slice(&book).unwrap();
        book["nodes"][0]["granted"][0].as_u64().unwrap()
    };
    assert!(granted() > 0);
    // removed: refused while somebody has it
    server.refuses(&["remove", "zwei"], 4, "is connected; unmount it there, or say --force");
    let said = server.volume(&["remove", "zwei", "--force"]);
    assert!(said.contains("the next start of the server serves it again"), "{said}");
    assert!(granted() > 0);
    wait_for("the mount says so", 20, || {
        let status = second.status();
        let error = status["last_error"].as_str().unwrap_or_default().to_owned();
        status["connected"] == false && error.contains("not served any more")
    });
    assert_eq!(std::fs::read_to_string(second.at("newest")).unwrap(), "newest", "from the cache");
    std::fs::write(second.at("alone"), "alone").unwrap();
    let names: Vec<_> = server.list().iter().map(|it| it["name"].clone()).collect();
    assert_eq!(names, ["one"]);
    std::fs::write(first.at("g"), "still").unwrap();
    first.sync();
    assert_eq!(std::fs::read_to_string(one.join("g")).unwrap(), "still");
    // what was changed meanwhile comes when it is served again: the same volume, by its id
    server.volume(&["create", "zwei", text(two)]);
    wait_for("the mount is back", 40, || second.is_connected());
    second.sync();
    assert_eq!(std::fs::read_to_string(two.join("alone")).unwrap(), "alone");
    second.umount();
    server.volume(&["remove", "zwei"]);
    drop(first);
}

#[test]
fn a_volume_becomes_read_only_with_all_that_is_done() {
    let Some(disk) = Disk::for_trees() else { return };
    let dir = disk.dir("served");
    let mut server = Server::start(&["--listen", FREE, &format!("v={}", text(&dir))]);
    // nothing would be shipped for an hour
    let mut mount = Mount::with(server.source("v"), &disk.dir("c"), "age=1h");
    for n in 0..50 {
        std::fs::write(mount.at(format!("f{n}")), "x").unwrap();
    }
    let open = std::fs::File::options().write(true).open(mount.at("f0")).unwrap();
    assert!(mount.pending() > 0 && std::fs::read_dir(&dir).unwrap().count() < 50);
    server.volume(&["set", "v", "--mode", "ro"]);
    assert_eq!(server.of("v")["mode"], "ro");
    assert_eq!(std::fs::read(dir.join("f49")).unwrap(), b"x", "what was done has come");
    wait_for("the mount knows it", 20, || {
        mount.is_connected() && errno(std::fs::write(mount.at("g"), "g")) == EROFS
    });
    assert_eq!(errno(std::fs::remove_file(mount.at("f1"))), EROFS);
    assert_eq!(errno(std::fs::create_dir(mount.at("d"))), EROFS);
    assert_eq!(errno(std::fs::rename(mount.at("f1"), mount.at("f2"))), EROFS);
    let write = std::fs::File::options().write(true).open(mount.at("f1"));
    assert_eq!(errno(write.map(drop)), EROFS);
    assert_eq!(std::fs::read_to_string(mount.at("f1")).unwrap(), "x");
    assert_eq!(mount.pending(), 0, "nothing was journaled for it");
    drop(open);
    // offline, and after another life of the mount, it is known all the same
    let port = format!("127.0.0.1:{}", server.port);
    server.stop();
    wait_for("the mount is away", 20, || !mount.is_connected());
    assert_eq!(errno(std::fs::write(mount.at("g"), "g")), EROFS);
    mount.kill();
    mount.umount_dead();
    mount.again();
    assert_eq!(errno(std::fs::write(mount.at("g"), "g")), EROFS);
    let export = format!("v={}", text(&dir));
    server = Server::start(&["--listen", &port, &export]);
    wait_for("the mount is back", 40, || mount.is_connected());
    assert_eq!(errno(std::fs::write(mount.at("g"), "g")), EROFS, "the server knows it as well");
    server.volume(&["set", "v", "--mode", "rw"]);
    wait_for("the mount may write", 40, || std::fs::write(mount.at("g"), "g").is_ok());
    mount.sync();
    assert_eq!(std::fs::read_to_string(dir.join("g")).unwrap(), "g");
}

#[test]
fn who_was_away_keeps_its_changes_until_they_are_taken() {
    let Some(disk) = Disk::for_trees() else { return };
    let dir = disk.dir("served");
    let server = Server::start(&["--listen", FREE, &format!("v={}", text(&dir))]);
    let mut mount = Mount::with(server.source("v"), &disk.dir("c"), "age=1h");
    std::fs::write(mount.at("f"), "before").unwrap();
    mount.freeze();
    // it does not hand in what it has
    server.refuses(&["set", "v", "--mode", "ro"], 4, "say --force");
    assert_eq!(server.of("v")["mode"], "rw");
    server.volume(&["set", "v", "--mode", "ro", "--force"]);
    mount.thaw();
    wait_for("it is back, and its changes wait", 30, || {
        let status = mount.status();
        let error = status["last_error"].as_str().unwrap_or_default().to_owned();
        error.contains("read-only") || status["connected"] == true && mount.pending() > 0
    });
    assert!(!dir.join("f").exists());
    assert_eq!(std::fs::read_to_string(mount.at("f")).unwrap(), "before");
    server.refuses(&["remove", "v"], 4, "--force");
    server.volume(&["set", "v", "--mode", "rw"]);
    wait_for("the mount may write", 30, || std::fs::write(mount.at("g"), "after").is_ok());
    mount.sync();
    assert_eq!(std::fs::read_to_string(dir.join("f")).unwrap(), "before");
    assert_eq!(std::fs::read_to_string(dir.join("g")).unwrap(), "after");
    mount.no_conflicts();
    mount.umount();
}

#[test]
fn a_configuration_is_read_checked_and_kept() {
    let Some(disk) = Disk::for_trees() else { return };
    let [one, two, three] = &dirs(&disk, &["one", "two", "three"])[..] else { panic!() };
    let (state, file) = (disk.dir("state"), disk.path().join("imz.toml"));
    let before = format!(
        "# ours\nlisten = \"{FREE}\"\nstate = {state:?}\n\n[[volume]]\nname = \"one\"\ndir = \
         {one:?}\nquota = \"1G\" # enough\n\n# for all to read\n[[volume]]\nname = \"two\"\ndir = \
         {two:?}\nmode = \"ro\"\n"
    );
    std::fs::write(&file, &before).unwrap();
    let name = text(&file);
    assert_eq!(imz_run(&["serve", "--check-config", name]), (0, String::new()));
    assert!(!state.join("one").exists() && !one.join(".imz").exists(), "it opens nothing");
    let mut server = Server::start(&["--config", name]);
    assert_eq!(server.of("one")["quota_bytes"], 1 << 30);
    assert_eq!((&server.of("two")["mode"], server.list().len()), (&"ro".into(), 2));
    assert!(state.join("two/state.json").exists());
    let first = Mount::with(server.source("one"), &disk.dir("c1"), "age=0");
    std::fs::write(first.at("f"), "f").unwrap();

    // what is changed online stands in the file, and its comments stay
    assert_eq!(server.volume(&["create", "three", text(three), "--quota", "7M"]), "");
    server.volume(&["set", "one", "--quota", "2G", "--user-quota", "5=1M"]);
    server.volume(&["set", "two", "--mode", "rw"]);
    server.volume(&["rename", "one", "uno"]);
    let after = std::fs::read_to_string(&file).unwrap();
    for part in
        ["# ours", "quota = \"2G\" # enough", "# for all to read", "name = \"uno\"", "\"7M\""]
    {
        assert!(after.contains(part), "{part} in {after}");
    }
    assert_eq!(imz_run(&["serve", "--check-config", name]), (0, String::new()));
    let port = format!("127.0.0.1:{}", server.port);
    server.stop();
    // flags win; the renamed volume has its state where it was
    server = Server::start(&["--config", name, "--listen", &port]);
    let uno = server.of("uno");
    assert_eq!((&uno["quota_bytes"], &uno["users"][0]["uid"]), (&(2u64 << 30).into(), &5.into()));
    assert_eq!(server.of("two")["mode"], "rw");
    assert_eq!(server.of("three")["quota_bytes"], 7 << 20);
    wait_for("the mount is back", 20, || first.is_connected());
    assert_eq!(first.status()["volume"], "uno");
    std::fs::write(first.at("g"), "g").unwrap();
    first.sync();
    assert_eq!(std::fs::read_to_string(one.join("g")).unwrap(), "g");

    // a file that was broken meanwhile is left alone, and nothing is changed
    std::fs::write(&file, after.replace("quota = \"2G\"", "quota = \"much\"")).unwrap();
    server.refuses(&["set", "three", "--quota", "8M"], 1, "line 8: quota");
    assert_eq!(server.of("three")["quota_bytes"], 7 << 20);
    std::fs::write(&file, &after).unwrap();
    assert_eq!(server.volume(&["remove", "three"]), "");
    assert!(!std::fs::read_to_string(&file).unwrap().contains("three"));
    // what the file says is all that holds
    let text = std::fs::read_to_string(&file).unwrap().replace("quota = \"2G\" # enough\n", "");
    std::fs::write(&file, text).unwrap();
    server.stop();
    server = Server::start(&["--config", name, "--listen", &port]);
    assert_eq!(server.of("uno")["quota_bytes"], Value::Null);
    drop(first);
}

#[test]
fn a_configuration_with_faults_is_refused_line_by_line() {
    let at = tempfile::tempdir().unwrap();
    let file = at.path().join("imz.toml");
    let name = text(&file);
    imz_fails(&["serve", "--check-config", name], 1, "No such file");
    let faulty =
        "listen = \"0.0.0.0:1\"\ncolour = 1\n[[volume]]\nname = \"x\"\ndir = \"/nowhere/x\"\n";
    std::fs::write(&file, faulty).unwrap();
    for how in ["--check-config", "--config"] {
        let (code, said) = imz_run(&["serve", how, name]);
        assert_eq!(code, 2, "{said}");
        for part in [name, "line 1: listen", "line 2: unknown key colour"] {
            assert!(said.contains(part), "{part} in {said}");
        }
    }
    std::fs::write(&file, "[[volume]]\nname = \"x\"\ndir = \"/nowhere/x\"\n").unwrap();
    imz_fails(
        &["serve", "--check-config", name],
        2,
        "line 1: volume x: /nowhere/x: no such directory",
    );
    imz_fails(&["serve", "--config", name], 5, "/nowhere/x: no such directory");
    std::fs::write(&file, "[[volume]\n").unwrap();
    imz_fails(&["serve", "--check-config", name], 2, "line 1");
    imz_fails(&["serve", "--config", name, "/tmp"], 2, "cannot be used with");
    imz_fails(&["serve"], 2, "[NAME=]DIR");
}

#[test]
fn a_server_is_found_or_asked_for() {
    let Some(disk) = Disk::for_trees() else { return };
    let [one, two] = &dirs(&disk, &["one", "two"])[..] else { panic!() };
    let first = Server::start(&["--listen", FREE, text(one)]);
    let second = Server::start(&["--listen", FREE, text(two)]);
    imz_fails(&["volume", "list"], 2, "say --server PID");
    for server in [text(one), &first.child.id().to_string()] {
        let (code, said) = imz_run(&["volume", "list", "--server", server]);
        assert!(code == 0 && said.contains("one"), "{said}");
    }
    imz_fails(&["volume", "list", "--server", "1"], 5, "no imz serve");
    imz_fails(&["volume", "list", "--server", text(disk.path())], 5, "no imz serve serves it");
    let pid = second.child.id();
    drop(second); // killed: what it leaves is not taken for a server
    imz_fails(&["volume", "list", "--server", &pid.to_string()], 5, "no imz serve");
    let mount = Mount::with(first.source("one"), &disk.dir("c"), "");
    let socket = imz::net::control::socket_path(mount.path());
    imz_fails(&["volume", "list", "--server", text(&socket)], 1, "this is a mount");
    imz_fails(&["volume", "set", "one", "--server", text(one)], 2, "nothing to change");
}
