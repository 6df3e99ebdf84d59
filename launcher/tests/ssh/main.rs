//! `--hosts`: agents that are started by a real ssh, on two addresses of this machine.

#[path = "../common/harness.rs"]
#[allow(dead_code, reason = "what only the other test programs use")]
mod harness;
#[path = "../common/program.rs"]
mod program;
#[path = "../common/secret.rs"]
#[allow(dead_code, reason = "as above")]
mod secret;
mod server;

use harness::{
    FAKE, NODE_TIMEOUT, Outcome, Running, Scene, alive, finish, parent, send, start, until,
};
use rustix::process::Signal;
use server::Server;
use std::process::Command;
use std::sync::Arc;

/// The hosts of an ssh server, which share the folder of a test.
struct Hosts {
    server: Arc<Server>,
    scene: Scene,
}

impl Hosts {
    /// `None`, said on stderr, where no ssh server can run.
    fn new() -> Option<Hosts> {
        let (server, scene) = (Server::shared()?, Scene::new());
        Some(Hosts { server, scene })
    }

    /// `tsm-launch` with fake workers that do `actions`. The agents are a copy in the scene, so that
    /// [`Scene::assert_nothing_survives`] finds them, their guards and their workers.
    fn start(&self, options: &str, actions: &str) -> Running {
        start(&mut self.command(options, actions))
    }

    fn command(&self, options: &str, actions: &str) -> Command {
        let path = |name: &str| self.scene.path(name).display().to_string();
        let copy = self.scene.own_launcher().display().to_string();
        let (ssh, marker) = (self.server.ssh(), path("mark-{rank}"));
        let mut words = vec!["--run-dir", "run", "--ssh", &ssh];
        words.extend(["--node-timeout", NODE_TIMEOUT]);
        if !options.contains("--remote-launcher") {
            words.extend(["--remote-launcher", &copy]);
        }
        words.extend(options.split_whitespace());
        words.extend(["--", FAKE, "--touch", &marker]);
        words.extend(actions.split_whitespace());
        let mut command = self.scene.command(&words);
        command.env("TSM_TEST_VARIABLE", "it's here");
        command.env("TMPDIR", "/nowhere");
        command
    }

    fn launch(&self, options: &str, actions: &str) -> Outcome {
        finish(self.start(options, actions))
    }

    /// Starts one worker on each of two hosts that do `actions` without end; the launcher, and their pids.
    fn two_at_work(&self, options: &str, actions: &str) -> (Running, Vec<i32>) {
        let options = format!("--hosts node-a:1,node-b:1 --cpus 1 {options}");
        let pids = self.scene.path("pid-{rank}").display().to_string();
        let running = self.start(&options, &format!("--touch {pids} {actions}"));
        (running, self.scene.wait_for_pids("pid-", 2))
    }

    /// Workers that run until they are told to end.
    fn at_work(&self) -> (Running, Vec<i32>) {
        self.two_at_work("", "--fork --hang")
    }

    /// Workers that are started again when a host is lost, and end when the file `go` is there. Each
    /// generation writes its pids.
    fn restarting(&self, options: &str) -> (Running, Vec<i32>) {
        let options = format!("--max-restarts 3 --grace 1s {options}");
        let actions = format!("--wait-for {}", self.scene.path("go").display());
        let (running, pids) = self.two_at_work(&options, &actions);
        for rank in 0..2 {
            fs_err::remove_file(self.scene.path(&format!("pid-{rank}"))).unwrap();
        }
        (running, pids)
    }
}

fn command(pid: i32) -> String {
    let words = fs_err::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ")
}

/// The ssh that holds the agent on `host`.
fn find_ssh(launcher: i32, host: &str) -> Option<i32> {
    let pids = fs_err::read_dir("/proc").unwrap().flatten();
    let mut pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.find(|&pid| {
        let words = command(pid);
        words.contains("/ssh -F ")
            && words.contains(&format!(" -- {host} exec "))
            && parent(pid) == Some(launcher)
    })
}

fn ssh_of(launcher: i32, host: &str) -> i32 {
    find_ssh(launcher, host).expect("an ssh")
}

/// Linux allows 2 MiB in all, and 128 KiB for each.
#[test]
fn a_large_environment_reaches_all_hosts() {
    let Some(hosts) = Hosts::new() else {
        return;
    };
    let mut command = hosts.command("--hosts node-a:1,node-b:1 --cpus 4", "--print-env");
    for n in 0..12 {
        command.env(format!("LARGE_{n}"), format!("{n:x}").repeat(127 << 10));
    }
    let outcome = finish(start(&mut command));
    assert_eq!(outcome.code, 0, "{:.2000}", outcome.err);
    for (rank, host) in [(0, "node-a"), (1, "node-b")] {
        let log = hosts.scene.read(&format!("logs/{host}-{rank}.out"));
        for n in 0..12 {
            let line = format!("LARGE_{n}={}", format!("{n:x}").repeat(127 << 10));
            assert!(log.lines().any(|l| l == line), "{host}: LARGE_{n}");
        }
    }
}

#[test]
fn two_hosts_run_the_job_in_the_same_folder_with_the_same_environment() {
    let Some(hosts) = Hosts::new() else {
        return;
    };
    let outcome = hosts.launch(
        "--hosts node-a:2,node-b:1 --cpus 4 --env EXTRA=a",
        "--touch here-{rank} --print-env",
    );
    assert_eq!(outcome.code, 0, "{}\n{}", outcome.err, outcome.out);
    for rank in 0..3 {
        assert!(hosts.scene.path(&format!("here-{rank}")).exists());
        let host = if rank < 2 { "node-a" } else { "node-b" };
        let log = hosts.scene.read(&format!("logs/{host}-{rank}.out"));
        let has = |line: &str| log.lines().any(|l| l == line);
        let local = rank % 2;
        for line in [
            "TSM_TEST_VARIABLE=it's here",
            "EXTRA=a",
            &format!(
                "PWD={}",
                hosts.scene.path("").canonicalize().unwrap().display()
            ),
            "WORLD_SIZE=3",
            &format!("RANK={rank}"),
            &format!("LOCAL_RANK={local}"),
            &format!("NODE_RANK={}", rank / 2),
            &format!("LOCAL_WORLD_SIZE={}", 2 - rank / 2),
            "CUDA_VISIBLE_DEVICES=",
        ] {
            assert!(has(line), "{line}\n{log}");
        }
        assert!(!has("TMPDIR=/nowhere"), "it belongs to the first host");
    }
    assert!(outcome.out.contains("node-b"), "{}", outcome.out);
    let manifest = hosts.scene.json("manifest.json");
    assert_eq!(manifest["world_size"], 3);
    assert_eq!(manifest["nodes"][1]["host"], "node-b");
    hosts.scene.assert_nothing_survives();
}

#[test]
fn the_exit_code_and_the_report_are_those_of_the_rank_that_failed() {
    let Some(hosts) = Hosts::new() else {
        return;
    };
    let file = hosts.scene.path("hosts");
    fs_err::write(&file, "# two of them\nnode-a slots=1\nnode-b:1\n").unwrap();
    let options = format!("--hostfile {} --cpus 1", file.display());
    let outcome = hosts.launch(&options, "--on-rank 1 --say broken --exit 17");
    assert_eq!(outcome.code, 17, "{}", outcome.err);
    assert!(
        outcome.err.contains("rank 1 failed first: exit code 17"),
        "{}",
        outcome.err
    );
    assert_eq!(hosts.scene.json("failure.json")["host"], "node-b");
    assert_eq!(hosts.scene.json("failure.json")["stderr"][0], "broken");
    hosts.scene.assert_nothing_survives();
}

#[test]
fn what_keeps_ssh_or_the_agent_from_starting_is_said_in_its_own_words() {
    let Some(server) = Server::shared() else {
        return;
    };
    for (options, words) in [
        (
            "--hosts node-a,intruder --cpus 1",
            "intruder cannot run the job: ssh ended with exit code 255: no connection",
        ),
        (
            "--hosts intruder --cpus 1",
            " -o BatchMode=yes intruder true` works, and connect once by hand",
        ),
        (
            "--hosts intruder --cpus 1",
            "\n  root@127.0.0.1: Permission denied",
        ),
        ("--hosts stranger --cpus 1", "Host key verification failed"),
        (
            "--hosts no-such-host.invalid --cpus 1",
            "Could not resolve hostname",
        ),
        (
            "--hosts node-a --cpus 1 --remote-launcher /nowhere/tsm-launch",
            "exit code 127: tsm-launch is not there; install it at the same path",
        ),
        (
            "--hosts node-a --cpus 1 --remote-launcher /dev/null",
            "exit code 126",
        ),
        (
            "--hosts node-a,node-b --gpus 1000",
            "cannot start 1000 workers: --gpus is 1000",
        ),
    ] {
        let (server, scene) = (Arc::clone(&server), Scene::new());
        let hosts = Hosts { server, scene };
        let outcome = hosts.launch(options, "");
        assert_eq!(outcome.code, 69, "{options}\n{}", outcome.err);
        assert!(outcome.err.contains(words), "{options}\n{}", outcome.err);
        assert!(!hosts.scene.path("mark-0").exists(), "{options}");
        hosts.scene.assert_nothing_survives();
    }
}

#[test]
fn a_shell_that_greets_does_no_harm() {
    let Some(hosts) = Hosts::new() else {
        return;
    };
    let outcome = hosts.launch(
        "--hosts greeter:1,node-b:1 --cpus 1",
        "--say at-work --exit 0",
    );
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert!(!outcome.err.contains("Last login"), "{}", outcome.err);
    assert!(outcome.err.contains("at-work"), "{}", outcome.err);
    hosts.scene.assert_nothing_survives();
}

#[test]
fn a_killed_ssh_ends_its_agent_and_the_job() {
    let Some(hosts) = Hosts::new() else {
        return;
    };
    let (running, pids) = hosts.at_work();
    send(ssh_of(running.pid(), "node-b"), Signal::KILL);
    let outcome = finish(running);
    assert_eq!(outcome.code, 76, "{}", outcome.err);
    assert!(outcome.err.contains("node-b is lost"), "{}", outcome.err);
    assert!(!alive(pids[0]), "the launcher waits for its own");
    hosts.scene.assert_nothing_survives();
}

#[test]
fn a_killed_server_ends_its_agent_and_the_job() {
    let Some(hosts) = Hosts::new() else {
        return;
    };
    let (running, pids) = hosts.at_work();
    let agent = parent(pids[1]).unwrap();
    assert!(
        command(agent).contains("--host node-b"),
        "{}",
        command(agent)
    );
    let session = parent(agent).unwrap();
    assert!(command(session).starts_with("sshd"), "{}", command(session));
    send(session, Signal::KILL);
    let outcome = finish(running);
    assert_eq!(outcome.code, 76, "{}", outcome.err);
    assert!(outcome.err.contains("node-b is lost"), "{}", outcome.err);
    hosts.scene.assert_nothing_survives();
}

#[test]
fn nothing_survives_a_killed_launcher() {
    let Some(hosts) = Hosts::new() else {
        return;
    };
    let (running, pids) = hosts.at_work();
    send(running.pid(), Signal::KILL);
    assert_eq!(finish(running).code, 137);
    hosts.scene.assert_nothing_survives();
    assert!(pids.iter().all(|&pid| !alive(pid)));
}

#[test]
fn a_signal_reaches_the_workers_of_all_hosts() {
    let Some(hosts) = Hosts::new() else {
        return;
    };
    let (running, _) = hosts.at_work();
    running.signal(Signal::TERM);
    let outcome = finish(running);
    assert_eq!(outcome.code, 143, "{}", outcome.err);
    assert!(
        outcome.err.contains("SIGTERM: stopping 2 workers"),
        "{}",
        outcome.err
    );
    hosts.scene.assert_nothing_survives();
}

#[test]
fn a_lost_host_is_tried_again_and_the_job_goes_on_meanwhile() {
    let Some(hosts) = Hosts::new() else {
        return;
    };
    let (running, first) = hosts.restarting("--nodes 1:2");
    let launcher = running.pid();
    let lost = ssh_of(launcher, "node-b");
    send(lost, Signal::KILL);
    let again = hosts.scene.wait_for_pids("pid-", 1);
    assert_ne!(again[0], first[0]);
    // It comes back, and waits until it is needed.
    until("another ssh to the lost host", || {
        find_ssh(launcher, "node-b").filter(|&ssh| ssh != lost)
    });
    until("its agent to join", || {
        let events = fs_err::read_to_string(hosts.scene.run_dir().join("events.jsonl")).ok()?;
        let joins = events.lines().filter(|line| line.contains("\"join\""));
        (joins.count() == 3).then_some(())
    });
    fs_err::write(hosts.scene.path("go"), "").unwrap();
    let outcome = finish(running);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    hosts.scene.assert_nothing_survives();
}

#[test]
fn a_job_that_needs_all_hosts_waits_for_the_lost_one() {
    let Some(hosts) = Hosts::new() else {
        return;
    };
    let (running, _) = hosts.restarting("");
    send(ssh_of(running.pid(), "node-a"), Signal::KILL);
    hosts.scene.wait_for_pids("pid-", 2);
    fs_err::write(hosts.scene.path("go"), "").unwrap();
    let outcome = finish(running);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let generations = &hosts.scene.json("manifest.json")["generations"];
    assert_eq!(generations.as_array().unwrap().len(), 2, "{generations}");
    hosts.scene.assert_nothing_survives();
}

#[test]
fn a_host_whose_ssh_or_agent_hangs_gets_another() {
    for stop_agent in [false, true] {
        let Some(hosts) = Hosts::new() else {
            return;
        };
        let (running, pids) = hosts.restarting("--join-timeout 30m");
        let ssh = ssh_of(running.pid(), "node-b");
        let agent = parent(pids[1]).unwrap();
        send(if stop_agent { agent } else { ssh }, Signal::STOP);
        hosts.scene.wait_for_pids("pid-", 2);
        assert!(!alive(ssh), "stopped agent: {stop_agent}");
        fs_err::write(hosts.scene.path("go"), "").unwrap();
        if stop_agent {
            // Nobody ends it but itself, once it runs on.
            send(agent, Signal::CONT);
        }
        let outcome = finish(running);
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        let text = "waiting up to 30m for 1 node to join; missing: node-b";
        assert!(outcome.err.contains(text), "{}", outcome.err);
        hosts.scene.assert_nothing_survives();
    }
}

/// A script that stands for ssh: what it does on the `$host` that it is to start an agent on with `$command`.
fn own_ssh(scene: &Scene, script: &str) -> String {
    let ssh = scene.path("ssh");
    let find = "for word; do host=$command; command=$word; done\n";
    program::write_program(&ssh, format!("#!/bin/sh\n{find}{script}\n"));
    ssh.display().to_string()
}

#[test]
fn a_host_that_never_gets_to_start_its_agent_is_named_with_the_words_of_its_shell() {
    let scene = Scene::new();
    let stuck = "[ $host = b ] && { echo 'reading /home quota' >&2; exec sleep 1000; }";
    let ssh = own_ssh(&scene, &format!("{stuck}\nexec sh -c \"$command\""));
    let launcher = scene.own_launcher().display().to_string();
    let options = format!(
        "--hosts a:1,b:1 --cpus 1 --join-timeout 30m --ssh {ssh} --remote-launcher {launcher}"
    );
    let running = scene.start(&options, "--hang");
    until("the wait to be told", || {
        let events = fs_err::read_to_string(scene.run_dir().join("events.jsonl")).ok()?;
        events.contains(r#""hosts":["b"]"#).then_some(())
    });
    running.signal(Signal::TERM);
    let outcome = finish(running);
    let text = "waiting up to 30m for 1 node to join; missing: b\n  heard from b so far: reading /home quota";
    assert!(outcome.err.contains(text), "{}", outcome.err);
    assert_eq!(outcome.code, 143, "{}", outcome.err);
    scene.assert_nothing_survives();
}

#[test]
fn no_more_than_64_connections_are_made_at_once() {
    let scene = Scene::new();
    let ssh = scene.path("ssh");
    // It tells its host, and never gets anywhere.
    let script = format!(
        "#!/bin/sh\nfor word; do host=$last; last=$word; done\n: > {}/at-$host\nexec sleep 1000\n",
        scene.path("").display()
    );
    program::write_program(&ssh, script);
    let hosts: Vec<String> = (0..70).map(|i| format!("host-{i}")).collect();
    let (hosts, ssh) = (hosts.join(","), ssh.display().to_string());
    let words = ["--hosts", &hosts, "--ssh", &ssh, "--cpus", "1", "--", FAKE];
    let running = start(&mut scene.command(&words));
    let tried = || {
        let entries = fs_err::read_dir(scene.path("")).unwrap().flatten();
        let names = entries.map(|e| e.file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("at-")).count()
    };
    until("64 connections", || (tried() >= 64).then_some(()));
    running.signal(Signal::TERM);
    let outcome = finish(running);
    assert_eq!(outcome.code, 143, "{}", outcome.err);
    assert_eq!(tried(), 64);
    scene.assert_nothing_survives();
}

#[test]
fn a_plan_needs_no_connection() {
    let scene = Scene::new();
    let words = [
        "--hosts",
        "a:2,me@b",
        "--gpus",
        "auto",
        "--dry-run",
        "--remote-launcher",
        "/opt/tsm-launch",
        "--ssh",
        "sh",
        "--",
        FAKE,
    ];
    let outcome = finish(start(&mut scene.command(&words)));
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    for line in [
        "a: ranks 0 to 1",
        "b: one rank on each of its GPUs",
        "me@b 'exec /opt/tsm-launch __agent --stdio --gpus auto --order 1 --host b'",
    ] {
        assert!(outcome.out.contains(line), "{line}\n{}", outcome.out);
    }
    assert!(!scene.path("runs").exists());
}

#[test]
fn a_wrong_list_of_hosts_is_refused() {
    for (words, why) in [
        ("--hosts a,a --cpus 1", "a is named twice"),
        ("--hosts -oProxyCommand=x --cpus 1", ""),
        ("--hostfile none --cpus 1", "--hostfile: "),
        (
            "--hosts a --nodes 2 --cpus 1",
            "--nodes asks for 2 nodes, 1 host is named",
        ),
        ("--hosts a --hostfile b --cpus 1", "cannot be used with"),
        (
            "--hosts a --rendezvous b:1 --key-file c --cpus 1",
            "cannot be used with",
        ),
    ] {
        let scene = Scene::new();
        let outcome = scene.launch(words, "");
        assert_eq!(outcome.code, 64, "{words}\n{}", outcome.err);
        assert!(outcome.err.contains(why), "{words}\n{}", outcome.err);
        assert!(!scene.path("run").exists(), "{words}");
    }
    let scene = Scene::new();
    let outcome = scene.launch("--hosts a --ssh no-such-ssh --cpus 1", "");
    assert_eq!(outcome.code, 69, "{}", outcome.err);
}

/// Neither of tsm-launch, ssh and the agents, nor of guards and workers.
#[test]
fn no_process_shows_the_key() {
    let Some(hosts) = Hosts::new() else {
        return;
    };
    let (running, _) = hosts.at_work();
    ssh_of(running.pid(), "node-b");
    assert_eq!(secret::exposed(&hosts.scene.path("")), [""; 0]);
    running.signal(Signal::INT);
    finish(running);
    hosts.scene.assert_nothing_survives();
}
