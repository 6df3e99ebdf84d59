pub fn describe(pid: i32) -> String { format!("{pid}") }
