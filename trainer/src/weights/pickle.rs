//! Python's pickle format, read as data: names of classes and functions stay names, and nothing
//! is imported or called.
//!
//! The opcodes are those of protocols 2 to 5 (PEP 307, PEP 3154, PEP 574) without the text forms
//! of protocols 0 and 1, which `torch.save` does not write.

use anyhow::{Context, Result, bail};

/// Index of a [`Node`]: pickles share objects, and fill containers after sharing them.
pub(super) type Id = usize;

/// One object.
#[derive(Debug)]
pub(super) enum Node {
    None,
    Int(i64),
    Text(String),
    /// Lists, tuples and sets.
    Sequence(Vec<Id>),
    /// Dictionaries, ordered or not, in the order written.
    Dict(Vec<(Id, Id)>),
    /// `module name`, not imported.
    Global(String),
    /// A call that was asked for, not made: function or class, and arguments.
    Call(Id, Id),
    /// A reference to something outside the pickle.
    Persistent(Id),
    /// A value no weight is made of: a float, bytes, a number beyond 64 bits.
    Opaque,
}

/// The objects of one pickle.
pub(super) struct Pickle {
    nodes: Vec<Node>,
    pub(super) root: Id,
    /// Bytes of the input that the pickle took.
    pub(super) length: usize,
}

impl Pickle {
    /// Reads the pickle at the start of `bytes`.
    pub(super) fn parse(bytes: &[u8]) -> Result<Pickle> {
        let mut machine = Machine {
            input: bytes,
            at: 0,
            nodes: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: Vec::new(),
        };
        loop {
            let at = machine.at;
            if let Some(root) = machine
                .step()
                .with_context(|| format!("pickle opcode at byte {at}"))?
            {
                return Ok(Pickle {
                    nodes: machine.nodes,
                    root,
                    length: machine.at,
                });
            }
        }
    }

    /// Every object of the pickle, in no useful order.
    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub(super) fn node(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        match self.node(id) {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn int(&self, id: Id) -> Option<i64> {
        match self.node(id) {
            Node::Int(value) => Some(*value),
            _ => None,
        }
    }

    pub(super) fn sequence(&self, id: Id) -> Option<&[Id]> {
        match self.node(id) {
            Node::Sequence(items) => Some(items),
            _ => None,
        }
    }

    pub(super) fn dict(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.node(id) {
            Node::Dict(items) => Some(items),
            _ => None,
        }
    }

    pub(super) fn global(&self, id: Id) -> Option<&str> {
        match self.node(id) {
            Node::Global(name) => Some(name),
            _ => None,
        }
    }
}

struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    /// Heights of the stack at open marks.
    marks: Vec<usize>,
    memo: Vec<Option<Id>>,
}

impl Machine<'_> {
    /// Executes one opcode; the root object at STOP.
    fn step(&mut self) -> Result<Option<Id>> {
        let opcode = self.take(1)?[0];
        match opcode {
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'.' => return self.pop().map(Some),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Int(1)),
            0x89 => self.push(Node::Int(0)),
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Node::Int(value.into()));
            }
            b'K' => {
                let value = self.number(1)?;
                self.push(Node::Int(value as i64));
            }
            b'M' => {
                let value = self.number(2)?;
                self.push(Node::Int(value as i64));
            }
            0x8a => self.long(1)?,
            0x8b => self.long(4)?,
            b'G' => {
                self.take(8)?;
                self.push(Node::Opaque);
            }
            b'X' | b'T' => self.text(4)?,
            0x8c | b'U' => self.text(1)?,
            0x8d => self.text(8)?,
            b'C' => self.bytes(1)?,
            b'B' => self.bytes(4)?,
            0x8e | 0x96 => self.bytes(8)?,
            b']' | b')' | 0x8f => self.push(Node::Sequence(Vec::new())),
            b't' | b'l' | 0x91 => {
                let items = self.pop_to_mark()?;
                self.push(Node::Sequence(items));
            }
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let start = self
                    .stack
                    .len()
                    .checked_sub(count)
                    .context("the stack is too short")?;
                let items = self.stack.split_off(start);
                self.push(Node::Sequence(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_to_mark()?;
                self.extend(items)?;
            }
            b'}' => self.push(Node::Dict(Vec::new())),
            b'd' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Dict(pairs(&items)));
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.insert(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.insert(&items)?;
            }
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.push(Node::Global(format!("{module} {name}")));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Node::Text(name), Node::Text(module)) =
                    (&self.nodes[name], &self.nodes[module])
                else {
                    bail!("a global is named by two texts");
                };
                let global = format!("{module} {name}");
                self.push(Node::Global(global));
            }
            b'R' | 0x81 => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.call(function, arguments);
            }
            0x92 => {
                let (_keywords, arguments, function) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(function, arguments);
            }
            // State of an object: of a state dict it is only version numbers.
            b'b' => drop(self.pop()?),
            b'Q' => {
                let id = self.pop()?;
                self.push(Node::Persistent(id));
            }
            b'q' => {
                let key = self.number(1)?;
                self.remember(key)?;
            }
            b'r' => {
                let key = self.number(4)?;
                self.remember(key)?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'h' => self.recall(1)?,
            b'j' => self.recall(4)?,
            other => bail!("0x{other:02x} is not an opcode that torch.save writes"),
        }
        Ok(None)
    }

    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let rest = &self.input[self.at..];
        if count > rest.len() {
            bail!("the pickle ends within {count} bytes, after {}", rest.len());
        }
        self.at += count;
        Ok(&rest[..count])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("N bytes were taken"))
    }

    /// A little-endian unsigned number of `width` bytes.
    fn number(&mut self, width: usize) -> Result<u64> {
        Ok(self
            .take(width)?
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    /// The bytes after a length of `width` bytes.
    fn counted(&mut self, width: usize) -> Result<&[u8]> {
        let count = self.number(width)?;
        self.take(usize::try_from(count).context("a length beyond the address space")?)
    }

    fn text(&mut self, width: usize) -> Result<()> {
        let text = String::from_utf8_lossy(self.counted(width)?).into_owned();
        self.push(Node::Text(text));
        Ok(())
    }

    fn bytes(&mut self, width: usize) -> Result<()> {
        self.counted(width)?;
        self.push(Node::Opaque);
        Ok(())
    }

    /// A signed little-endian number of any length.
    fn long(&mut self, width: usize) -> Result<()> {
        let bytes = self.counted(width)?;
        let negative = bytes.last().is_some_and(|&b| b >= 0x80);
        let node = if bytes.len() > 8 {
            Node::Opaque
        } else {
            let mut padded = [if negative { 0xFF } else { 0 }; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            Node::Int(i64::from_le_bytes(padded))
        };
        self.push(node);
        Ok(())
    }

    fn line(&mut self) -> Result<String> {
        let rest = &self.input[self.at..];
        let end = rest
            .iter()
            .position(|&b| b == b'\n')
            .context("a name without an end")?;
        let line = String::from_utf8_lossy(&rest[..end]).into_owned();
        self.at += end + 1;
        Ok(line)
    }

    fn push(&mut self, node: Node) {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
    }

    fn top(&self) -> Result<Id> {
        self.stack.last().copied().context("the stack is empty")
    }

    fn pop(&mut self) -> Result<Id> {
        self.stack.pop().context("the stack is empty")
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().context("no mark on the stack")?;
        if mark > self.stack.len() {
            bail!("the stack is shorter than at its last mark");
        }
        Ok(self.stack.split_off(mark))
    }

    /// Objects that were not built take no items, so what is added to them goes nowhere.
    fn extend(&mut self, items: Vec<Id>) -> Result<()> {
        let top = self.top()?;
        if let Node::Sequence(list) = &mut self.nodes[top] {
            list.extend(items);
        }
        Ok(())
    }

    fn insert(&mut self, items: &[Id]) -> Result<()> {
        let top = self.top()?;
        if let Node::Dict(dict) = &mut self.nodes[top] {
            dict.extend(pairs(items));
        }
        Ok(())
    }

    fn call(&mut self, function: Id, arguments: Id) {
        let ordered = matches!(&self.nodes[function], Node::Global(name) if name == "collections OrderedDict");
        self.push(if ordered {
            Node::Dict(Vec::new())
        } else {
            Node::Call(function, arguments)
        });
    }

    fn remember(&mut self, key: u64) -> Result<()> {
        let top = self.top()?;
        // Keys are handed out in order, one per object, so no file needs more than it has bytes.
        let key = usize::try_from(key)
            .ok()
            .filter(|&k| k < self.input.len())
            .context("a memo key out of range")?;
        if self.memo.len() <= key {
            self.memo.resize(key + 1, None);
        }
        self.memo[key] = Some(top);
        Ok(())
    }

    fn recall(&mut self, width: usize) -> Result<()> {
        let key = self.number(width)?;
        let id = self
            .memo
            .get(key as usize)
            .copied()
            .flatten()
            .with_context(|| format!("nothing at memo key {key}"))?;
        self.stack.push(id);
        Ok(())
    }
}

fn pairs(items: &[Id]) -> Vec<(Id, Id)> {
    items
        .chunks_exact(2)
        .map(|pair| (pair[0], pair[1]))
        .collect()
}
