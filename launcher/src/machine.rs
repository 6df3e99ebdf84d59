//! What this machine is doing: load and memory, cheaply and often.

use std::time::Duration;

/// How long a reading is good for.
const FRESH: Duration = Duration::from_secs(2);

/// Load average and memory, read again every two seconds.
pub struct Load {
    system: sysinfo::System,
    read_at: Option<Duration>,
    last: (f32, u64),
}

impl Load {
    pub fn new() -> Load {
        Load {
            system: sysinfo::System::new(),
            read_at: None,
            last: (0.0, 0),
        }
    }

    /// One-minute load average, and bytes of memory in use. `now` counts from any start.
    pub fn read(&mut self, now: Duration) -> (f32, u64) {
        if self.read_at.is_none_or(|at| now >= at + FRESH) {
            self.read_at = Some(now);
            self.system.refresh_memory();
            self.last = (
                sysinfo::System::load_average().one as f32,
                self.system.used_memory(),
            );
        }
        self.last
    }
}

impl Default for Load {
    fn default() -> Load {
        Load::new()
    }
}
