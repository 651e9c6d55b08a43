//! Which start of the machine this is: what is in the page cache lives as long.

/// Changes with each start of the machine; empty where the kernel does not say.
pub fn id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}
