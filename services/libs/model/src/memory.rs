//! Memory that this process may still take: the machine's, and that of every control group it is in.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory left, and what limits it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AvailableMemory {
    /// Bytes that may still be taken.
    pub bytes: u64,
    /// The machine's figure or the control group's file that says so.
    pub limited_by: String,
}

/// What this process may still take. `None` where nothing says how much that is.
pub fn available_memory() -> Option<AvailableMemory> {
    available(Path::new("/proc"), Path::new("/sys/fs/cgroup"))
}

/// Looks under the roots of `/proc` and `/sys/fs/cgroup`. `None` where neither says anything.
fn available(proc: &Path, cgroup: &Path) -> Option<AvailableMemory> {
    let machine = fs::read_to_string(proc.join("meminfo")).ok().and_then(|text| machine(&text));
    let groups = fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
    let limits = directories(&groups, cgroup).into_iter().filter_map(|(dir, names)| group(&dir, names));
    machine.into_iter().chain(limits).min_by_key(|available| available.bytes)
}

fn machine(meminfo: &str) -> Option<AvailableMemory> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(AvailableMemory { bytes: kib.saturating_mul(1024), limited_by: "MemAvailable".into() })
}

/// Files of one version of control groups: limit, usage.
type FileNames = [&'static str; 2];
const V2: FileNames = ["memory.max", "memory.current"];
const V1: FileNames = ["memory.limit_in_bytes", "memory.usage_in_bytes"];

/// Directories of the process's memory groups and all their parents. In a container the path may be that of the host
/// and lead nowhere; the root of the mount is then the container's own group.
fn directories(groups: &str, root: &Path) -> Vec<(PathBuf, FileNames)> {
    let mut directories = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, names) = match controllers {
            "" => (root.to_path_buf(), V2),
            listed if listed.split(',').any(|name| name == "memory") => (root.join("memory"), V1),
            _ => continue,
        };
        let relative = Path::new(path.trim_start_matches('/'));
        directories.extend(relative.ancestors().map(|ancestor| (root.join(ancestor), names)));
    }
    directories
}

/// What one group leaves: its limit less what is used; cached file pages count as free, for the kernel drops them.
fn group(dir: &Path, [limit, usage]: FileNames) -> Option<AvailableMemory> {
    let number = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    let max = number(limit)?;
    let cached = fs::read_to_string(dir.join("memory.stat")).map_or(0, |stat| cached(&stat));
    let used = number(usage)?.saturating_sub(cached);
    Some(AvailableMemory { bytes: max.saturating_sub(used), limited_by: dir.join(limit).display().to_string() })
}

fn cached(stat: &str) -> u64 {
    let counted = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        ["inactive_file", "active_file"].contains(&name).then(|| value.trim().parse::<u64>().ok())?
    };
    stat.lines().filter_map(counted).fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    fn look(files: &[(&str, &str)]) -> Option<AvailableMemory> {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), files);
        let mut available = available(&root.path().join("proc"), &root.path().join("cgroup"))?;
        let prefix = format!("{}/", root.path().display());
        available.limited_by = available.limited_by.replace(&prefix, "");
        Some(available)
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal: 900 kB\nMemAvailable:    500 kB\n");

    #[test]
    fn without_groups_the_machine_limits() {
        let found = look(&[MEMINFO]).unwrap();
        assert_eq!(found, AvailableMemory { bytes: 500 * 1024, limited_by: "MemAvailable".into() });
    }

    #[test]
    fn the_tightest_group_limits_and_cached_files_count_as_free() {
        let found = look(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/pod/container\n"),
            ("cgroup/pod/memory.max", "100000\n"),
            ("cgroup/pod/memory.current", "90000\n"),
            ("cgroup/pod/memory.stat", "anon 20000\ninactive_file 50000\nactive_file 20000\n"),
            ("cgroup/pod/container/memory.max", "max\n"),
            ("cgroup/pod/container/memory.current", "90000\n"),
        ]);
        let expected = AvailableMemory { bytes: 80000, limited_by: "cgroup/pod/memory.max".into() };
        assert_eq!(found.unwrap(), expected);
    }

    #[test]
    fn the_first_version_of_groups_is_read_too() {
        let found = look(&[
            MEMINFO,
            ("proc/self/cgroup", "5:cpu,memory:/job\n3:pids:/job\n"),
            ("cgroup/memory/job/memory.limit_in_bytes", "1000\n"),
            ("cgroup/memory/job/memory.usage_in_bytes", "400\n"),
        ]);
        assert_eq!(found.unwrap().bytes, 600);
    }

    #[test]
    fn a_machine_that_says_nothing_limits_nothing() {
        assert_eq!(look(&[]), None);
        assert_eq!(look(&[("proc/meminfo", "MemAvailable: many kB\n")]), None);
    }
}
