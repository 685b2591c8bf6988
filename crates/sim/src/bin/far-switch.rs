//! A switch between network interfaces that are far from each other: see `pgstrata_sim::Switch`. For tests and benchmarks,
//! on kernels with and without `netem`.
//!
//! `far-switch [--seed NUMBER] [--capacity FRAMES] INTERFACE INTERFACE...` makes these interfaces (TAP devices) in its network
//! namespace, from where they can be moved to others, and says when they are there. A line of its standard input,
//! `DELAY_MS LOSS_PERCENT`, is for each way between two of them, and is answered with what became of frames so far. It ends
//! with its standard input, so whoever started it can't leave it behind, and the interfaces end with it.

use std::fmt::Display;
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};

use pgstrata_sim::Switch;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};

/// More than a device gives at once: it cuts what is larger than its MTU.
const MAX_FRAME: usize = 16 << 10;
/// Frames taken from a device before others get their turn.
const FRAMES_A_TURN: usize = 64;
/// Longest delay.
const MAX_DELAY: Duration = Duration::from_secs(60);
/// Longest command.
const MAX_LINE: usize = 100;
/// Frames on one way unless it is said: 20 ms at 3 Gbit/s.
const CAPACITY: usize = 5000;

/// `TUNSETIFF` of `linux/if_tun.h`.
const SET_INTERFACE: rustix::ioctl::Opcode = opcode::write::<i32>(b'T', 202);
/// `IFF_TAP | IFF_NO_PI`: frames, and nothing before them.
const FRAMES_ONLY: u16 = 0x0002 | 0x1000;

/// `struct ifreq` of `linux/if.h`.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

fn interface(wanted: &str) -> Result<OwnedFd, String> {
    let failed = |error: &dyn Display| format!("can't make interface {wanted}: {error}");
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let device = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
        .map_err(|error| failed(&format!("/dev/net/tun: {error}")))?;
    let mut request = InterfaceRequest { name: [0; 16], flags: FRAMES_ONLY, rest: [0; 22] };
    // The last byte stays zero.
    let name = request.name[..15].get_mut(..wanted.len());
    name.ok_or_else(|| failed(&"its name is too long"))?.copy_from_slice(wanted.as_bytes());
    // SAFETY: the kernel reads and writes a `struct ifreq` for this request, of 40 bytes on 64-bit systems, which
    // `InterfaceRequest` has too; it keeps no pointer to it.
    unsafe { ioctl(&device, Updater::<SET_INTERFACE, _>::new(&mut request)) }
        .map_err(|error| failed(&error))?;
    Ok(device)
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40);

/// `DELAY_MS LOSS_PERCENT`.
fn parse(line: &str) -> Option<(Duration, f64)> {
    let (delay_ms, loss) = line.trim().split_once(' ')?;
    let delay = Duration::try_from_secs_f64(delay_ms.parse::<f64>().ok()? / 1000.0).ok()?;
    let loss = loss.parse().ok().filter(|loss| (0.0..=100.0).contains(loss))?;
    (delay <= MAX_DELAY).then_some((delay, loss))
}

fn say(text: &str) -> Result<(), String> {
    let mut out = std::io::stdout();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|error| error.to_string())
}

struct Far {
    switch: Switch,
    devices: Vec<OwnedFd>,
    /// What came of a command that is not whole yet.
    line: Vec<u8>,
}

impl Far {
    fn describe(&self) -> String {
        let counts = self.switch.counts();
        format!(
            r#"{{"forwarded":{},"lost":{},"dropped":{},"late":{}}}"#,
            counts.forwarded, counts.lost, counts.dropped, counts.late
        )
    }

    /// Gives devices what is due.
    fn deliver(&mut self) {
        while let Some((to, frame)) = self.switch.depart(Instant::now()) {
            // One that is down takes nothing, as a cable that is not plugged in.
            if rustix::io::write(&self.devices[to], &frame).is_err() {
                self.switch.not_taken();
            }
        }
    }

    /// Takes what a device has, for a while. False once it is gone.
    fn take(&mut self, from: usize) -> Result<bool, String> {
        let mut buffer = [MaybeUninit::uninit(); MAX_FRAME];
        for _ in 0..FRAMES_A_TURN {
            match rustix::io::read(&self.devices[from], &mut buffer) {
                Ok((frame, _)) => self.switch.arrive(Instant::now(), from, frame),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                // With its namespace.
                Err(Errno::BADFD) => return Ok(false),
                Err(error) => return Err(format!("can't read interface {from}: {error}")),
            }
        }
        Ok(true)
    }

    /// Does what it is told. False when it is to end.
    fn obey(&mut self) -> Result<bool, String> {
        let mut buffer = [0; MAX_LINE];
        let count = match rustix::io::read(std::io::stdin(), &mut buffer) {
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(true),
            Err(error) => return Err(format!("can't read standard input: {error}")),
        };
        self.line.extend_from_slice(&buffer[..count]);
        while let Some(end) = self.line.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let (delay, loss) = parse(&line)
                .ok_or_else(|| format!("not DELAY_MS LOSS_PERCENT: {}", line.trim()))?;
            self.switch.set(delay, loss);
            say(&self.describe())?;
        }
        match self.line.len() > MAX_LINE {
            true => Err("a command is too long".to_owned()),
            false => Ok(count > 0),
        }
    }

    fn run(&mut self) -> Result<(), String> {
        loop {
            let due = self.switch.next_due();
            let wait = due.map(|due| due.saturating_duration_since(Instant::now()));
            let wait = wait.map(|wait| Timespec {
                tv_sec: wait.as_secs().cast_signed(),
                tv_nsec: wait.subsec_nanos().into(),
            });
            let stdin = std::io::stdin();
            let input = stdin.as_fd();
            let devices = self.devices.iter().map(AsFd::as_fd);
            let polled =
                devices.chain([input]).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            let mut polled: Vec<PollFd<'_>> = polled.collect();
            match poll(&mut polled, wait.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(format!("can't wait: {error}")),
            }
            let is_ready =
                |(index, one): (usize, &PollFd<'_>)| (!one.revents().is_empty()).then_some(index);
            let ready: Vec<usize> = polled.iter().enumerate().filter_map(is_ready).collect();
            drop(polled);
            self.deliver();
            for index in ready {
                let goes_on = match index == self.devices.len() {
                    true => self.obey()?,
                    false => self.take(index)?,
                };
                if !goes_on {
                    return Ok(());
                }
            }
        }
    }
}

fn number<T: FromStr>(option: &str, value: Option<String>) -> Result<T, String> {
    let value = value.unwrap_or_default();
    value.parse().map_err(|_| format!("{option} wants a number: '{value}'"))
}

/// A line does not wait until the machine has time, so this comes before all processes of the usual kind. Where that is not
/// allowed, more frames are late, and counted so.
fn come_first() {
    let lowest = libc::sched_param { sched_priority: 1 };
    // SAFETY: the kernel reads one `sched_param`, which lives longer than the call; 0 is this process.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const lowest) };
}

fn start() -> Result<(), String> {
    let (mut seed, mut capacity, mut names) = (1, CAPACITY, Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--seed" => seed = number(&argument, arguments.next())?,
            "--capacity" => capacity = number(&argument, arguments.next())?,
            _ if argument.starts_with('-') => return Err(format!("what is '{argument}'?")),
            _ => names.push(argument),
        }
    }
    if names.len() < 2 {
        return Err("usage: far-switch [--seed NUMBER] [--capacity FRAMES] INTERFACE INTERFACE..."
            .to_owned());
    }
    let devices = names.iter().map(|name| interface(name)).collect::<Result<Vec<_>, _>>()?;
    come_first();
    let switch = Switch::new(devices.len(), capacity, seed);
    let mut far = Far { switch, devices, line: Vec::new() };
    say(r#"{"ready":true}"#)?;
    far.run()?;
    say(&far.describe())
}

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("far-switch: {text}");
            ExitCode::FAILURE
        }
    }
}
