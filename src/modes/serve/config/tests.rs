use super::*;

const WHOLE: &str = r#"# our server
listen = "127.0.0.1:7071" # not the usual port
state = "/var/lib/imz"
keep_grant = "2d" # the cameras are on the road

# what the cameras make
[[volume]]
name = "photos"
dir = "/srv/photos/"
quota = "200G"  # asked for by Eve
quota_files = 1_000_000

[volume.user_quota]
1000 = "20G" # Eve

# for all
[[volume]]
name = "doc"
dir = "/srv/doc"
state = "/fast/doc"
mode = "ro"
"#;

fn faults(text: &str) -> Vec<(usize, String)> {
    parse(text).unwrap_err().into_iter().map(|fault| (fault.line, fault.what)).collect()
}

#[test]
fn a_whole_file_is_read() {
    let config = parse(WHOLE).unwrap();
    assert_eq!(config.listen, Some("127.0.0.1:7071".parse().unwrap()));
    assert_eq!(config.state, Some("/var/lib/imz".into()));
    assert_eq!(config.keep_grant, Some(Duration::from_secs(2 * 24 * 3600)));
    let photos = VolumeConfig {
        name: "photos".into(),
        dir: "/srv/photos".into(),
        state: None,
        quota: Quota { bytes: Some(200 << 30), files: Some(1_000_000) },
        read_only: false,
        users: [(1000, 20 << 30)].into(),
        line: 7,
    };
    let doc = VolumeConfig {
        name: "doc".into(),
        dir: "/srv/doc".into(),
        state: Some("/fast/doc".into()),
        read_only: true,
        line: 17,
        ..VolumeConfig::default()
    };
    assert_eq!(config.volumes, [photos, doc]);
    assert_eq!(parse("").unwrap(), Config::default());
    assert_eq!(check_dirs(&parse("[[volume]]\nname='x'\ndir='/'").unwrap()), []);
    assert_eq!(check_dirs(&config)[0].line, 7);
}

#[test]
fn every_fault_is_told_with_its_line() {
    let text = r#"listen = "0.0.0.0:7070"
port = 7070
[[volume]]
name = "a/b"
dir = "srv"
quota = "much"
quota_files = -1
mode = "rwx"
color = "red"
[volume.user_quota]
eve = "1G"
1000 = 1.5
[[volume]]
name = "x"
[[volume]]
name = "x"
dir = "/srv"
[[volume]]
name = "y"
dir = "/srv/"
quota = ["1G"]
user_quota = 5
"#;
    let want = [
        (1, "keys yet"),
        (2, "unknown key port; known here: listen, state, keep_grant, volume"),
        (4, "no slash"),
        (5, "whole path"),
        (6, "quota: a size is written"),
        (7, "quota_files: write a number"),
        (8, "\"rw\" or \"ro\""),
        (9, "unknown key color"),
        (11, "by its number"),
        (12, "1000: a size is written"),
        (13, "has no dir"),
        (15, "volume x already"),
        (18, "/srv is a volume already"),
        (21, "quota: a size"),
        (22, "[volume.user_quota]"),
    ];
    let found = faults(text);
    assert_eq!(found.len(), want.len(), "{found:#?}");
    for ((line, what), (want_line, part)) in found.iter().zip(want) {
        assert!(
            *line == want_line && what.contains(part),
            "{line}: {what}, not {want_line} {part}"
        );
    }
    assert!(faults("\nkeep_grant = \"long\"")[0].1.contains("keep_grant: "));
    for (text, line) in [("a = 1\nb = = 2\n", 2), ("[[volume]\n", 1), ("a = 1\na = 2\n", 2)] {
        let found = faults(text);
        assert_eq!((found.len(), found[0].0), (1, line), "{text}: {found:?}");
    }
    assert_eq!(faults("volume = 5\n")[0], (1, "volume: each volume begins with [[volume]]".into()));
    assert_eq!(faults("[volume]\nname = \"x\"\n")[0].0, 1);
}

#[test]
fn a_change_leaves_the_rest_as_it_is() {
    let users = vec![(1000, Limit::Unlimited), (1001, Limit::At(3 << 20))];
    let change =
        Change { bytes: Limit::At(100 << 20), read_only: Some(true), users, ..<_>::default() };
    let text = edit(WHOLE, &Edit::Set { name: "photos", change: &change }).unwrap();
    let want = WHOLE
        .replace("\"200G\"", "\"100M\"")
        .replace("quota_files = 1_000_000\n", "quota_files = 1_000_000\nmode = \"ro\"\n")
        .replace("1000 = \"20G\" # Eve\n", "1001 = \"3M\"\n");
    assert_eq!(text, want);
    let rename = Edit::Rename { name: "doc", to: "docs", state: Some(Path::new("/s/doc")) };
    let text = edit(WHOLE, &rename).unwrap();
    assert_eq!(text, WHOLE.replace("\"doc\"", "\"docs\"").replace("/fast/doc", "/s/doc"));
    let text = edit(WHOLE, &Edit::Remove("doc")).unwrap();
    assert!(text.starts_with(WHOLE[..WHOLE.find("# for all").unwrap()].trim_end()), "{text}");
    assert_eq!(parse(&text).unwrap().volumes.len(), 1);
    // and with nothing left
    let text = edit(&text, &Edit::Remove("photos")).unwrap();
    assert_eq!(parse(&text).unwrap().volumes, []);
    let volume = VolumeConfig {
        name: "new".into(),
        dir: "/srv/a \"b\"".into(),
        quota: Quota { bytes: Some(1000), files: None },
        users: [(7, 1 << 40)].into(),
        ..VolumeConfig::default()
    };
    for before in ["", WHOLE, &text] {
        let after = edit(before, &Edit::Add(&volume)).unwrap();
        let found = parse(&after).unwrap().volumes.pop().unwrap();
        assert_eq!(VolumeConfig { line: 0, ..found }, volume, "{after}");
        assert!(after.contains("quota = \"1000\"") && after.contains("7 = \"1T\""), "{after}");
    }
}

#[test]
fn what_was_changed_meanwhile_is_left_alone() {
    let refused = |text: &str, change: &Edit| edit(text, change).unwrap_err();
    assert!(refused(WHOLE, &Edit::Remove("gone")).contains("has no volume gone"));
    assert!(refused("x = 1\n", &Edit::Remove("doc")).contains("line 1: unknown key x"));
    let twin = parse(WHOLE).unwrap().volumes.remove(0);
    assert!(refused(WHOLE, &Edit::Add(&twin)).contains("already"));
    let clash = Edit::Rename { name: "doc", to: "photos", state: None };
    assert!(refused(WHOLE, &clash).contains("already"));
}

#[test]
fn a_change_is_put_in_place_or_never_was() {
    let at = tempfile::tempdir().unwrap();
    let path = at.path().join("imz.toml");
    std::fs::write(&path, WHOLE).unwrap();
    let (file, text) = ConfigFile::open(&path).unwrap();
    assert_eq!(text, WHOLE);
    drop(file.stage(&Edit::Remove("doc")).unwrap());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), WHOLE);
    file.stage(&Edit::Remove("doc")).unwrap().commit().unwrap();
    assert_eq!(parse(&std::fs::read_to_string(&path).unwrap()).unwrap().volumes.len(), 1);
    let left: Vec<_> = std::fs::read_dir(at.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "nothing is left beside it");
    std::fs::write(&path, vec![b'#'; (LEN_MAX + 1) as usize]).unwrap();
    assert!(ConfigFile::open(&path).is_err());
}
