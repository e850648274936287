//! A real etcd for tests: one node on free loopback ports, its data in a temporary folder, gone with its handle. A shell
//! holds it on a leash of standard input, so that it ends even when the test process is killed.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Starts etcd in the background, says its process id, and kills it when standard input ends.
const LEASH: &str = r#"log=$1; shift
etcd "$@" >"$log" 2>&1 </dev/null &
echo $!
read -r _
kill -KILL $!
wait $! 2>/dev/null"#;

const START_LIMIT: Duration = Duration::from_secs(20);
const ATTEMPTS: usize = 3;

/// A running etcd.
#[derive(Debug)]
pub struct Etcd {
    folder: TempDir,
    client: SocketAddr,
    peer: SocketAddr,
    leash: Option<Child>,
    pid: u32,
}

impl Etcd {
    /// Starts one, or says on standard error that `test` is skipped because etcd is not installed.
    ///
    /// # Panics
    /// When etcd is installed and does not start.
    pub fn start_or_skip(test: &str) -> Option<Self> {
        if Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
            // Not eprintln: what a passing test prints that way is not shown.
            let _ = writeln!(io::stderr(), "SKIP {test}: etcd is not installed");
            return None;
        }
        let mut last = String::new();
        for _ in 0..ATTEMPTS {
            match Self::start() {
                Ok(etcd) => return Some(etcd),
                Err(error) => last = error.to_string(),
            }
        }
        panic!("etcd does not start: {last}");
    }

    fn start() -> io::Result<Self> {
        let folder = TempDir::with_prefix("conclave-etcd-")?;
        let mut etcd = Self { folder, client: free_port()?, peer: free_port()?, leash: None, pid: 0 };
        etcd.launch()?;
        Ok(etcd)
    }

    /// Its client URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.client)
    }

    /// Stops its process without ending it, as a machine that hangs.
    ///
    /// # Errors
    /// When the signal cannot be sent.
    pub fn pause(&self) -> io::Result<()> {
        self.signal("STOP")
    }

    /// Lets it go on after [`Self::pause`].
    ///
    /// # Errors
    /// When the signal cannot be sent.
    pub fn resume(&self) -> io::Result<()> {
        self.signal("CONT")
    }

    /// Kills it. Its data stays.
    pub fn kill(&mut self) {
        let Some(mut leash) = self.leash.take() else { return };
        drop(leash.stdin.take());
        // The shell ends once etcd has; there is nothing to do about a failure to wait for it.
        let _ = leash.wait();
    }

    /// Starts it again after [`Self::kill`] at the same address, with its data or with none.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart(&mut self, keep_data: bool) -> io::Result<()> {
        self.kill();
        if !keep_data {
            fs::remove_dir_all(self.folder.path().join("data"))?;
        }
        self.launch()
    }

    fn launch(&mut self) -> io::Result<()> {
        let log = self.folder.path().join("log");
        let mut leash = Command::new("sh")
            .args(["-c", LEASH, "sh"])
            .arg(&log)
            .args(self.flags())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let said = leash.stdout.take().map(BufReader::new);
        self.leash = Some(leash);
        let mut pid = String::new();
        said.ok_or_else(|| io::Error::other("no standard output"))?.read_line(&mut pid)?;
        self.pid = pid.trim().parse().map_err(|_| io::Error::other(format!("no process id: {pid:?}")))?;
        self.wait_until_healthy(&log)
    }

    fn flags(&self) -> Vec<String> {
        let (client, peer) = (self.url(), format!("http://{}", self.peer));
        let data = self.folder.path().join("data");
        let mut flags = vec![format!("--data-dir={}", data.display()), "--name=one".into()];
        flags.extend([format!("--listen-client-urls={client}"), format!("--advertise-client-urls={client}")]);
        flags.extend([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")]);
        // A short election makes short leases possible: etcd grants no less than one and a half elections.
        flags.extend([format!("--initial-cluster=one={peer}"), "--heartbeat-interval=50".into()]);
        flags.push("--election-timeout=500".into());
        flags
    }

    fn wait_until_healthy(&self, log: &Path) -> io::Result<()> {
        let limit = Instant::now() + START_LIMIT;
        while !self.healthy() {
            if Instant::now() >= limit || !self.alive() {
                let log = fs::read_to_string(log).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(5).collect();
                return Err(io::Error::other(format!("not healthy; its last lines, newest first: {tail:?}")));
            }
            sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn healthy(&self) -> bool {
        let ask = || -> io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&self.client, Duration::from_secs(1))?;
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        ask().is_ok_and(|answer| answer.contains("\"true\""))
    }

    fn alive(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
    }

    fn signal(&self, name: &str) -> io::Result<()> {
        let status = Command::new("sh").args(["-c", &format!("kill -s {name} {}", self.pid)]).status()?;
        if status.success() { Ok(()) } else { Err(io::Error::other(format!("SIG{name} to {}: {status}", self.pid))) }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_port() -> io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}
