//! The two layouts of `torch.save`: a zip archive, and before PyTorch 1.6 a row of pickles with
//! the storages behind them.

use super::pickle::{Id, Node, Pickle};
use super::zip;
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;
use tch::{Kind, Tensor};

/// How a file of the layout before 1.6 begins: a pickle of PyTorch's magic number.
const LEGACY_MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e";

/// The named tensors of a state dict, or of the `state_dict` of a checkpoint.
pub(super) fn tensors(file: &[u8]) -> Result<Vec<(String, Tensor)>> {
    if let Some(rest) = file.strip_prefix(LEGACY_MAGIC) {
        legacy(rest)
    } else {
        archive(file)
    }
}

fn archive(file: &[u8]) -> Result<Vec<(String, Tensor)>> {
    let members = zip::members(file)?;
    let (prefix, pickle) = members
        .iter()
        .find_map(|(name, content)| Some((name.strip_suffix("data.pkl")?, *content)))
        .context("no member data.pkl: not an archive of torch.save")?;
    if let Some(order) = members.get(format!("{prefix}byteorder").as_str()) {
        ensure!(
            *order == b"little",
            "the numbers are big-endian; save the file on a little-endian machine"
        );
    }
    let pickle = Pickle::parse(pickle)?;
    state_dict(&pickle, |key| {
        let member = format!("{prefix}data/{key}");
        members
            .get(member.as_str())
            .copied()
            .with_context(|| format!("no member {member}"))
    })
}

/// After the magic number: version, machine, the object, the keys of its storages, and for each
/// key the number of elements and the elements.
fn legacy(mut rest: &[u8]) -> Result<Vec<(String, Tensor)>> {
    let mut next = |what: &str| -> Result<Pickle> {
        let pickle = Pickle::parse(rest).with_context(|| format!("the pickle of {what}"))?;
        rest = &rest[pickle.length..];
        Ok(pickle)
    };
    next("the version")?;
    next("the machine")?;
    let object = next("the object")?;
    let keys = next("the storage keys")?;
    let kinds: HashMap<String, Kind> = object
        .nodes()
        .iter()
        .filter_map(|node| match node {
            Node::Persistent(reference) => storage(&object, *reference).ok(),
            _ => None,
        })
        .map(|s| (s.key, s.kind))
        .collect();
    let mut storages = HashMap::new();
    for &key in keys
        .sequence(keys.root)
        .context("the storage keys are no list")?
    {
        let key = keys.text(key).context("a storage key is no text")?;
        let kind = kinds
            .get(key)
            .with_context(|| format!("no tensor uses storage {key}"))?;
        let (count, data) = rest
            .split_first_chunk::<8>()
            .context("the file ends before its storages")?;
        let length = u64::from_le_bytes(*count)
            .checked_mul(kind.elt_size_in_bytes() as u64)
            .filter(|&length| length <= data.len() as u64)
            .with_context(|| format!("the file ends within storage {key}"))?;
        let (content, behind) = data.split_at(length as usize);
        storages.insert(key.to_string(), content);
        rest = behind;
    }
    state_dict(&object, |key| {
        storages
            .get(key)
            .copied()
            .with_context(|| format!("no storage {key}"))
    })
}

fn state_dict<'a>(
    pickle: &Pickle,
    storage_bytes: impl Fn(&str) -> Result<&'a [u8]>,
) -> Result<Vec<(String, Tensor)>> {
    let root = pickle
        .dict(pickle.root)
        .context("the file holds no dictionary of tensors")?;
    let nested = root
        .iter()
        .find(|(key, _)| pickle.text(*key) == Some("state_dict"));
    let dict = match nested {
        Some((_, value)) => pickle
            .dict(*value)
            .context("its state_dict is no dictionary")?,
        None => root,
    };
    let mut tensors = Vec::new();
    for &(key, value) in dict {
        if let (Some(name), Some(view)) = (pickle.text(key), view(pickle, value)) {
            let tensor = view
                .and_then(|v| v.read(&storage_bytes))
                .with_context(|| format!("tensor {name}"))?;
            tensors.push((name.to_string(), tensor));
        }
    }
    ensure!(!tensors.is_empty(), "the file holds no named tensors");
    Ok(tensors)
}

/// Where a storage lies and what its elements are.
struct Storage {
    key: String,
    kind: Kind,
}

/// `('storage', class, key, location, numel)`, in the old layout with a view of another storage.
fn storage(pickle: &Pickle, reference: Id) -> Result<Storage> {
    let parts = pickle
        .sequence(reference)
        .context("a reference is no tuple")?;
    let [tag, class, key, _location, _numel, view @ ..] = parts else {
        bail!("a reference has {} parts", parts.len())
    };
    ensure!(
        pickle.text(*tag) == Some("storage"),
        "a reference to something other than a storage"
    );
    if let Some(&view) = view.first() {
        ensure!(
            matches!(pickle.node(view), Node::None),
            "a storage that is a view of another is not supported"
        );
    }
    let class = pickle.global(*class).context("a storage without a class")?;
    let kind = match class.rsplit(' ').next().unwrap_or_default() {
        "FloatStorage" => Kind::Float,
        "DoubleStorage" => Kind::Double,
        "HalfStorage" => Kind::Half,
        "BFloat16Storage" => Kind::BFloat16,
        "LongStorage" => Kind::Int64,
        "IntStorage" => Kind::Int,
        "ShortStorage" => Kind::Int16,
        "CharStorage" => Kind::Int8,
        "ByteStorage" => Kind::Uint8,
        "BoolStorage" => Kind::Bool,
        other => bail!("elements of the class {other} are not supported"),
    };
    let key = pickle
        .text(*key)
        .context("a storage without a key")?
        .to_string();
    Ok(Storage { key, kind })
}

/// A tensor's window on its storage, in elements.
struct View {
    storage: Storage,
    offset: i64,
    size: Vec<i64>,
    stride: Vec<i64>,
}

/// `None` when `id` is no tensor.
fn view(pickle: &Pickle, id: Id) -> Option<Result<View>> {
    let Node::Call(function, arguments) = pickle.node(id) else {
        return None;
    };
    let arguments = pickle.sequence(*arguments)?;
    match pickle.global(*function)? {
        "torch._utils _rebuild_tensor" | "torch._utils _rebuild_tensor_v2" => {
            Some(window(pickle, arguments))
        }
        // A parameter wraps the tensor it was made from; that one is never a parameter again.
        "torch._utils _rebuild_parameter" => match pickle.node(*arguments.first()?) {
            Node::Call(_, inner) => Some(window(pickle, pickle.sequence(*inner)?)),
            _ => None,
        },
        _ => None,
    }
}

fn window(pickle: &Pickle, arguments: &[Id]) -> Result<View> {
    let [reference, offset, size, stride, ..] = arguments else {
        bail!("{} arguments", arguments.len())
    };
    let Node::Persistent(reference) = pickle.node(*reference) else {
        bail!("it has no storage")
    };
    let numbers = |id: Id| -> Result<Vec<i64>> {
        let items = pickle.sequence(id).context("size and stride are tuples")?;
        items
            .iter()
            .map(|&i| {
                pickle
                    .int(i)
                    .filter(|&n| n >= 0)
                    .context("size and stride are natural")
            })
            .collect()
    };
    Ok(View {
        storage: storage(pickle, *reference)?,
        offset: pickle
            .int(*offset)
            .filter(|&n| n >= 0)
            .context("the offset is natural")?,
        size: numbers(*size)?,
        stride: numbers(*stride)?,
    })
}

impl View {
    fn read<'a>(&self, storage_bytes: &impl Fn(&str) -> Result<&'a [u8]>) -> Result<Tensor> {
        let View {
            storage,
            offset,
            size,
            stride,
        } = self;
        let bytes = storage_bytes(&storage.key)?;
        let numel = (bytes.len() / storage.kind.elt_size_in_bytes()) as i64;
        ensure!(
            size.len() == stride.len(),
            "size {size:?} and stride {stride:?} differ in length"
        );
        let last = size.iter().zip(stride).try_fold(*offset, |sum, (d, s)| {
            sum.checked_add((d - 1).max(0).checked_mul(*s)?)
        });
        let elements = size
            .iter()
            .try_fold(1i64, |product, d| product.checked_mul(*d));
        let fits = last.is_some_and(|last| last < numel) && elements.is_some_and(|n| n <= numel);
        ensure!(
            fits || elements == Some(0),
            "size {size:?}, stride {stride:?} and offset {offset} leave a storage of {numel} elements"
        );
        if elements == Some(0) {
            return Ok(Tensor::zeros(
                size.as_slice(),
                (storage.kind, tch::Device::Cpu),
            ));
        }
        let whole = &bytes[..numel as usize * storage.kind.elt_size_in_bytes()];
        let flat = Tensor::f_from_data_size(whole, &[numel], storage.kind)?;
        Ok(flat
            .f_as_strided(size.as_slice(), stride.as_slice(), *offset)?
            .f_contiguous()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(value: &str) -> Vec<u8> {
        [
            b"X",
            &(value.len() as u32).to_le_bytes()[..],
            value.as_bytes(),
        ]
        .concat()
    }

    /// A tensor 2 x 3 over storage `key`, laid out by `stride`, as torch.save writes it; `tail`
    /// stands at the end of the storage's tuple.
    fn tensor(key: &str, stride: [u8; 2], offset: u8, tail: &[u8]) -> Vec<u8> {
        [
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            &text("storage")[..],
            b"ctorch\nFloatStorage\n",
            &text(key),
            &text("cpu"),
            b"K\x06",
            tail,
            &[
                b't', b'Q', b'K', offset, b'(', b'K', 2, b'K', 3, b't', b'(', b'K', stride[0],
                b'K', stride[1], b't',
            ],
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
        .concat()
    }

    /// `{'epoch': 3, 'state_dict': OrderedDict(a.weight, b.weight), 'optimizer': <a call of os.system>}`
    fn checkpoint(tail: &[u8]) -> Vec<u8> {
        [
            b"\x80\x02}(",
            &text("epoch")[..],
            b"K\x03",
            &text("state_dict"),
            b"ccollections\nOrderedDict\n)Rq\x00(",
            &text("a.weight"),
            &tensor("s0", [3, 1], 0, tail),
            &text("b.weight"),
            &tensor("s0", [1, 2], 0, tail),
            b"u",
            &text("optimizer"),
            b"cos\nsystem\n",
            &text("echo executed"),
            b"\x85Ru.",
        ]
        .concat()
    }

    fn values() -> Vec<u8> {
        (0..6).flat_map(|v| (v as f32).to_le_bytes()).collect()
    }

    fn legacy_file() -> Vec<u8> {
        let keys = [&b"\x80\x02]"[..], &text("s0"), b"a."].concat();
        [
            LEGACY_MAGIC,
            b"\x80\x02M\xe9\x03.",
            b"\x80\x02}.",
            &checkpoint(b"N"),
            &keys,
            &6u64.to_le_bytes(),
            &values(),
        ]
        .concat()
    }

    fn zip_file() -> Vec<u8> {
        let members = [
            ("run/data.pkl", checkpoint(b"")),
            ("run/byteorder", b"little".to_vec()),
            ("run/data/s0", values()),
        ];
        let (mut file, mut directory) = (Vec::new(), Vec::new());
        for (name, content) in &members {
            let lengths = [(content.len() as u32).to_le_bytes(); 2].concat();
            let name_length = (name.len() as u16).to_le_bytes();
            let local = (file.len() as u32).to_le_bytes();
            file.extend(
                [
                    &b"PK\x03\x04"[..],
                    &[0; 14],
                    &lengths,
                    &name_length,
                    &[0; 2],
                    name.as_bytes(),
                    content,
                ]
                .concat(),
            );
            directory.extend(
                [
                    &b"PK\x01\x02"[..],
                    &[0; 16],
                    &lengths,
                    &name_length,
                    &[0; 12],
                    &local,
                    name.as_bytes(),
                ]
                .concat(),
            );
        }
        let (place, size) = (
            (file.len() as u32).to_le_bytes(),
            (directory.len() as u32).to_le_bytes(),
        );
        file.extend(directory);
        file.extend(
            [
                &b"PK\x05\x06"[..],
                &[0; 4],
                &[3, 0, 3, 0],
                &size,
                &place,
                &[0; 2],
            ]
            .concat(),
        );
        file
    }

    #[test]
    fn both_layouts_give_the_tensors_and_call_nothing() {
        for file in [legacy_file(), zip_file()] {
            let tensors = tensors(&file).unwrap();
            assert_eq!(
                tensors
                    .iter()
                    .map(|(name, _)| name.as_str())
                    .collect::<Vec<_>>(),
                ["a.weight", "b.weight"]
            );
            for ((_, tensor), expected) in tensors.iter().zip([
                [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
                [0.0, 2.0, 4.0, 1.0, 3.0, 5.0],
            ]) {
                assert_eq!(tensor.size(), [2, 3]);
                assert_eq!(
                    Vec::<f32>::try_from(tensor.reshape([-1])).unwrap(),
                    expected
                );
            }
        }
    }

    #[test]
    fn cut_and_damaged_files_are_errors() {
        for file in [legacy_file(), zip_file()] {
            for length in 0..file.len() {
                assert!(
                    tensors(&file[..length]).is_err(),
                    "{length} of {} bytes",
                    file.len()
                );
            }
            // Any byte may be anything: an error or other numbers, never a panic.
            for at in 0..file.len() {
                for value in [0, 0x7F, 0xFF, b'.', b'('] {
                    let mut damaged = file.clone();
                    damaged[at] = value;
                    let _ = tensors(&damaged);
                }
            }
        }
    }

    #[test]
    fn a_view_beyond_its_storage_is_an_error() {
        let storage = || Storage {
            key: "s0".into(),
            kind: Kind::Float,
        };
        let bytes = values();
        let read = |offset: i64, size: [i64; 2], stride: [i64; 2]| {
            let view = View {
                storage: storage(),
                offset,
                size: size.into(),
                stride: stride.into(),
            };
            view.read(&|_: &str| Ok(&bytes[..]))
        };
        assert!(read(0, [2, 3], [3, 1]).is_ok());
        assert!(read(1, [2, 3], [3, 1]).is_err());
        assert!(read(0, [2, 3], [4, 1]).is_err());
        assert!(read(0, [i64::MAX, 3], [0, 1]).is_err());
        assert!(read(0, [2, 3], [i64::MAX, 1]).is_err());
        assert_eq!(read(9, [0, 3], [3, 1]).unwrap().size(), [0, 3]);
    }
}
