//! Network namespaces around a switch, each with a link of its own rate towards it.

use crate::proc;
use std::process::Command;
use std::time::Duration;

const PREFIX: &str = "sd-e2e-";
const HUB: &str = "sd-e2e-hub";

/// The switch and its namespaces; gone when dropped.
#[derive(Debug)]
pub struct Star {
    namespaces: Vec<String>,
}

impl Star {
    /// A namespace for each name; what it sends is limited to so many Mbit/s, if to any.
    pub fn up(ends: &[(&str, Option<u32>)]) -> Self {
        let namespaces = ends.iter().map(|(name, _)| format!("{PREFIX}{name}")).collect();
        let star = Self { namespaces };
        star.remove();
        ip(&["netns", "add", HUB]);
        ip(&["-n", HUB, "link", "add", "switch", "type", "bridge"]);
        ip(&["-n", HUB, "link", "set", "switch", "up"]);
        for (n, (end, (name, mbit))) in star.namespaces.iter().zip(ends).enumerate() {
            let port = format!("p-{name}");
            ip(&["netns", "add", end]);
            let peer = ["type", "veth", "peer", "name", "nl0", "netns", end];
            ip(&[&["-n", HUB, "link", "add", &port][..], &peer].concat());
            ip(&["-n", HUB, "link", "set", &port, "master", "switch", "up"]);
            ip(&["-n", end, "address", "add", &format!("10.79.0.{}/24", n + 1), "dev", "nl0"]);
            ip(&["-n", end, "link", "set", "lo", "up"]);
            ip(&["-n", end, "link", "set", "nl0", "up"]);
            if let Some(mbit) = mbit {
                let rate = format!("{mbit}mbit");
                let limit = ["tbf", "rate", &rate, "burst", "128kb", "latency", "50ms"];
                let args = [&["-n", end, "qdisc", "add", "dev", "nl0", "root"][..], &limit];
                proc::run(Command::new("tc").args(args.concat()), Duration::from_secs(5)).ok();
            }
        }
        star
    }

    /// The names of the namespaces, in the order of the ends.
    pub fn namespaces(&self) -> &[String] {
        &self.namespaces
    }

    fn remove(&self) {
        for namespace in self.namespaces.iter().map(String::as_str).chain([HUB]) {
            // One that is not there needs no removal.
            let args = ["netns", "del", namespace];
            let _ = proc::run(Command::new("ip").args(args), Duration::from_secs(5));
        }
    }
}

impl Drop for Star {
    fn drop(&mut self) {
        self.remove();
    }
}

#[track_caller]
fn ip(args: &[&str]) {
    proc::run(Command::new("ip").args(args), Duration::from_secs(5)).ok();
}
