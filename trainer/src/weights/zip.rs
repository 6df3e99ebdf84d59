//! The zip archives of `torch.save`: members stored without compression.

use anyhow::{Context, Result, bail};
use std::collections::HashMap;

const END: u32 = 0x0605_4B50;
const END64: u32 = 0x0606_4B50;
const LOCATOR64: u32 = 0x0706_4B50;
const CENTRAL: u32 = 0x0201_4B50;
const LOCAL: u32 = 0x0403_4B50;

/// Name to content of every member (PKWARE's APPNOTE, sections 4.3.7 to 4.3.16; zip64 included).
pub(super) fn members(file: &[u8]) -> Result<HashMap<String, &[u8]>> {
    let (count, mut at) = directory(file)?;
    let mut members = HashMap::new();
    for _ in 0..count {
        if number(file, at, 4)? != u64::from(CENTRAL) {
            bail!("no directory entry at byte {at}");
        }
        let field = |offset: u64, width| number(file, at + offset, width);
        let (name_length, extra_length, comment_length) =
            (field(28, 2)?, field(30, 2)?, field(32, 2)?);
        let name = String::from_utf8_lossy(slice(file, at + 46, name_length)?).into_owned();
        let extra = slice(file, at + 46 + name_length, extra_length)?;
        let [size, stored, local] =
            large_fields([field(24, 4)?, field(20, 4)?, field(42, 4)?], extra)
                .with_context(|| format!("member {name}"))?;
        if field(10, 2)? != 0 || size != stored {
            bail!("member {name} is compressed, which torch.save does not do");
        }
        if number(file, local, 4)? != u64::from(LOCAL) {
            bail!("member {name} has no header at byte {local}");
        }
        let start = local + 30 + number(file, local + 26, 2)? + number(file, local + 28, 2)?;
        members.insert(name, slice(file, start, size)?);
        at += 46 + name_length + extra_length + comment_length;
    }
    Ok(members)
}

/// Number of entries and place of the central directory.
fn directory(file: &[u8]) -> Result<(u64, u64)> {
    // The end record is 22 bytes and a comment of up to 65,535.
    let last = file
        .len()
        .checked_sub(22)
        .context("the file is shorter than an empty zip archive")?;
    let first = last.saturating_sub(65_535);
    let end = (first..=last)
        .rev()
        .find(|&at| file[at..].starts_with(&END.to_le_bytes()))
        .context("no end of a zip archive; is the file whole?")? as u64;
    if let Some(locator) = end.checked_sub(20)
        && number(file, locator, 4)? == u64::from(LOCATOR64)
    {
        let end64 = number(file, locator + 8, 8)?;
        if number(file, end64, 4)? != u64::from(END64) {
            bail!("no zip64 end record at byte {end64}");
        }
        return Ok((number(file, end64 + 32, 8)?, number(file, end64 + 48, 8)?));
    }
    Ok((number(file, end + 10, 2)?, number(file, end + 16, 4)?))
}

/// Fields that do not fit into 32 bits stand in the zip64 extra field, in this order.
fn large_fields(mut fields: [u64; 3], extra: &[u8]) -> Result<[u64; 3]> {
    let mut at = 0;
    while at + 4 <= extra.len() as u64 {
        let (id, length) = (number(extra, at, 2)?, number(extra, at + 2, 2)?);
        if id == 1 {
            let mut place = at + 4;
            for field in fields.iter_mut().filter(|f| **f == u64::from(u32::MAX)) {
                *field = number(extra, place, 8)?;
                place += 8;
            }
        }
        at += 4 + length;
    }
    Ok(fields)
}

fn slice(file: &[u8], at: u64, length: u64) -> Result<&[u8]> {
    let end = at
        .checked_add(length)
        .filter(|&end| end <= file.len() as u64);
    let end = end.with_context(|| format!("{length} bytes at byte {at} of {}", file.len()))?;
    Ok(&file[at as usize..end as usize])
}

/// A little-endian number of `width` bytes.
fn number(file: &[u8], at: u64, width: u64) -> Result<u64> {
    Ok(slice(file, at, width)?
        .iter()
        .rev()
        .fold(0, |value, &byte| value << 8 | u64::from(byte)))
}
