//! The built binary as a process: started, signalled, killed, restarted on the same data.

use crate::client::{PATIENCE, ask, get};
use crate::upstream::Upstream;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;
use tempfile::TempDir;

/// How a gateway is to be started.
#[derive(Clone)]
pub struct Setup {
    upstream: String,
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
    directory: Arc<TempDir>,
}

impl Setup {
    /// On free ports, with a data directory of its own, for a single tenant, unless said otherwise.
    pub fn new(upstream: &Upstream) -> Setup {
        Setup::for_url(&upstream.url())
    }

    pub fn for_url(upstream: &str) -> Setup {
        Setup {
            upstream: upstream.to_owned(),
            arguments: Vec::new(),
            variables: Vec::new(),
            directory: Arc::new(TempDir::new().unwrap()),
        }
    }

    pub fn flag(mut self, name: &str, value: &str) -> Setup {
        self.arguments.extend([name.to_owned(), value.to_owned()]);
        self
    }

    pub fn variable(mut self, name: &str, value: &str) -> Setup {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Adds a settings file.
    pub fn file(self, toml: &str) -> Setup {
        let path = self.directory.path().join("settings.toml");
        std::fs::write(&path, toml).unwrap();
        self.flag("--config", path.to_str().unwrap())
    }

    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oncekey"));
        // Nothing of the machine's own settings.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ONCEKEY_")) {
            command.env_remove(name);
        }
        command
            .args(["gateway", "--upstream", &self.upstream])
            .arg("--data")
            .arg(self.data())
            .args(&self.arguments)
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for (flag, variable, default) in [
            ("--listen", "ONCEKEY_LISTEN", "127.0.0.1:0"),
            ("--admin-listen", "ONCEKEY_ADMIN_LISTEN", "127.0.0.1:0"),
            ("--scope", "ONCEKEY_SCOPE", "single-tenant"),
        ] {
            if !self.arguments.iter().any(|argument| argument == flag) {
                command.env(variable, default);
            }
        }
        command
    }

    /// Starts it, and waits until it listens.
    pub fn start(&self) -> Gateway {
        let mut child = self.command().spawn().unwrap();
        let log = collect(child.stderr.take().unwrap());
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut address = |what: &str| {
            let line = lines.next().and_then(Result::ok).unwrap_or_default();
            let address =
                line.strip_prefix(what).and_then(|rest| rest.split("://").nth(1)).and_then(|rest| rest.parse().ok());
            address.unwrap_or_else(|| panic!("{line:?} is not {what:?}: {}", log.0.lock().unwrap()))
        };
        let (address, admin) = (address("listening on "), address("admin on "));
        Gateway { child, address, admin, log, setup: self.clone() }
    }

    /// Runs it to its end, which is expected at once; the exit code, standard output and standard error.
    pub fn refused(&self) -> (i32, String, String) {
        let output = self.command().output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }
}

type Log = (Arc<Mutex<String>>, JoinHandle<()>);

fn collect(mut from: impl Read + Send + 'static) -> Log {
    let text = Arc::new(Mutex::new(String::new()));
    let to = Arc::clone(&text);
    let thread = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(len @ 1..) = from.read(&mut bytes) {
            to.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..len]));
        }
    });
    (text, thread)
}

/// A running gateway; killed where it is dropped.
pub struct Gateway {
    child: Child,
    pub address: SocketAddr,
    pub admin: SocketAddr,
    log: Log,
    setup: Setup,
}

impl Gateway {
    /// `kill -9`; what starts another one on the same data.
    pub fn kill(&mut self) -> Setup {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.setup.clone()
    }

    /// `kill -9`, and a new one on the same data.
    pub fn kill_and_restart(mut self) -> Gateway {
        self.kill().start()
    }

    /// Memory that it holds now, in MiB.
    pub fn memory_mib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        // Of files only what is mapped counts there as well: the journal is, so it is left out.
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    }

    /// A number that it tells of itself, by its name and labels.
    pub fn metric(&self, name: &str) -> u64 {
        let metrics = ask(self.admin, get("/metrics", &[])).text();
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is missing: {metrics}")).parse().unwrap()
    }

    pub fn term(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end; how it ended, and all that it logged.
    pub fn wait(mut self) -> (ExitStatus, String) {
        let status = self.child.wait().unwrap();
        while !self.log.1.is_finished() {
            std::thread::yield_now();
        }
        (status, self.logged())
    }

    /// Waits until it logs this: an answer may arrive before the line that tells of it.
    pub fn wait_for_log(&self, text: &str) {
        let begun = Instant::now();
        while !self.logged().contains(text) {
            assert!(begun.elapsed() < PATIENCE, "{text:?} is not logged: {}", self.logged());
            std::thread::yield_now();
        }
    }

    fn logged(&self) -> String {
        self.log.0.lock().unwrap().clone()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
