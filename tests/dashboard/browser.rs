//! Node.js with its one package, which drives Chromium through `dashboard.mjs`.

use crate::shop::{ABSENT, COMPLETED, INTERRUPTED, PAYMENTS, RUNNING};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/dashboard");

/// Fetches the packages that the lock file names, unless they are there.
pub fn install() {
    let wanted = packages("package-lock.json");
    assert!(wanted.is_some(), "there is no package-lock.json to read");
    // npm leaves a list of what it installed.
    if packages("node_modules/.package-lock.json") == wanted {
        return;
    }
    let npm = Command::new("npm").args(["ci", "--no-audit", "--no-fund"]).current_dir(DIRECTORY).output();
    let output = npm.expect("npm starts");
    assert!(output.status.success(), "npm ci: {}", String::from_utf8_lossy(&output.stderr));
}

/// The packages of a lock file, but for the one that it is of.
fn packages(lock_file: &str) -> Option<Value> {
    let text = std::fs::read_to_string(Path::new(DIRECTORY).join(lock_file)).ok()?;
    let mut lock: Value = serde_json::from_str(&text).ok()?;
    let mut packages = lock.get_mut("packages")?.take();
    packages.as_object_mut()?.remove("");
    Some(packages)
}

/// How a gateway is looked at.
pub struct Look<'a> {
    pub token: Option<&'static str>,
    pub credential: Option<&'static str>,
    pub screenshot: Option<&'a Path>,
}

/// What the script said.
pub struct Report {
    pub is_success: bool,
    /// Checks that passed.
    pub passed: u64,
    pub output: String,
}

impl Look<'_> {
    /// Runs the checks on the page of an admin address.
    pub fn at(&self, admin: SocketAddr) -> Report {
        let mut script = Command::new("node");
        script
            .arg(Path::new(DIRECTORY).join("dashboard.mjs"))
            .arg(format!("http://{admin}/"))
            .args(["--path", PAYMENTS]);
        for (key, state) in
            [(COMPLETED, "completed"), (INTERRUPTED, "interrupted"), (RUNNING, "running"), (ABSENT, "absent")]
        {
            script.arg("--key").arg(format!("{key}={state}"));
        }
        script.args(self.token.iter().flat_map(|token| ["--token", token]));
        script.args(self.credential.iter().flat_map(|credential| ["--scope", credential]));
        if let Some(file) = self.screenshot {
            script.arg("--screenshot").arg(file);
        }
        let output = script.output().expect("node starts");
        let [said, complained] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        Report {
            is_success: output.status.success(),
            passed: said.lines().filter(|line| line.starts_with("ok ")).count() as u64,
            output: said + &complained,
        }
    }

    pub fn name(&self) -> &'static str {
        if self.token.is_some() { "with a token" } else { "without a token" }
    }
}
