//! `sd ls` and `sd tree`: listings of any length, printed as they arrive.

use super::Context;
use crate::args::{LsArgs, TreeArgs};
use crate::control::{Event, Request};
use crate::failure::{Code, Failure, Outcome};
use crate::output::{Output, local_time, printable, size};
use crate::paths;
use crate::reply::Item;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::Path;
use vfs_core::model::Name;
use vfs_core::path::SdPath;

pub fn ls(context: &Context, args: &LsArgs) -> Outcome<()> {
    let target = paths::target(args.address.as_deref())?;
    let request = Request::List { target, recursive: args.recursive };
    let mut above = None;
    stream(context, &request, |item, text| {
        if args.recursive {
            heading(item, &mut above, text);
        }
        match args.long {
            true => text.extend(long_line(item).into_bytes()),
            false => {
                text.extend(exact_name(item));
                if std::io::stdout().is_terminal() && kind_letter(&item.kind) == 'd' {
                    text.push(b'/');
                }
                text.push(b'\n');
            }
        }
    })
}

/// The address of a directory before its entries, as `ls -R` does.
fn heading(item: &Item, above: &mut Option<String>, text: &mut Vec<u8>) {
    let parent = match item.address.rsplit_once('/') {
        Some(("sd:/", _)) | None => "sd://",
        Some((parent, _)) => parent,
    };
    if above.as_deref() != Some(parent) {
        let gap = if above.is_some() { "\n" } else { "" };
        text.extend(format!("{gap}{parent}:\n").into_bytes());
        *above = Some(parent.to_owned());
    }
}

fn long_line(item: &Item) -> String {
    let mut line = format!(
        "{}{}  {:>10}  {:<16}  {}",
        kind_letter(&item.kind),
        item.mode.as_deref().and_then(mode_letters).unwrap_or_else(|| "---------".into()),
        item.size.map(size).unwrap_or_default(),
        item.mtime.as_deref().map(local_time).unwrap_or_default(),
        printable(&item.name),
    );
    if let Some(target) = &item.target {
        let _ = write!(line, " -> {}", printable(target));
    }
    line.push('\n');
    line
}

fn kind_letter(kind: &str) -> char {
    match kind {
        "directory" | "device" | "location" => 'd',
        "symlink" => 'l',
        "fifo" => 'p',
        "socket" => 's',
        "char_device" => 'c',
        "block_device" => 'b',
        _ => '-',
    }
}

fn mode_letters(octal: &str) -> Option<String> {
    let mode = u32::from_str_radix(octal, 8).ok()?;
    let special = [(0o4000, 2, 's'), (0o2000, 5, 's'), (0o1000, 8, 't')];
    let mut letters: Vec<char> = "rwxrwxrwx"
        .chars()
        .enumerate()
        .map(|(i, c)| if mode & (0o400 >> i) != 0 { c } else { '-' })
        .collect();
    for (bit, at, letter) in special {
        if mode & bit != 0 {
            letters[at] = if letters[at] == 'x' { letter } else { letter.to_ascii_uppercase() };
        }
    }
    Some(letters.into_iter().collect())
}

pub fn tree(context: &Context, args: &TreeArgs) -> Outcome<()> {
    let target = paths::target(args.address.as_deref())?;
    let request = Request::Tree { target, levels: args.level };
    let mut lasts: Vec<bool> = Vec::new();
    let top = args.address.as_deref().map_or("sd://".into(), Path::to_string_lossy);
    let mut heading = Some(format!("{}\n", printable(&top)));
    stream(context, &request, |item, text| {
        text.extend(heading.take().unwrap_or_default().bytes());
        let depth = item.depth.max(1) as usize - 1;
        lasts.truncate(depth);
        for last in &lasts {
            text.extend(if *last { "    " } else { "│   " }.bytes());
        }
        text.extend(if item.last { "└── " } else { "├── " }.bytes());
        lasts.push(item.last);
        // Drawn for people: a line end in a name must not break the drawing.
        text.extend(printable(&item.name).bytes());
        if let Some(target) = &item.target {
            text.extend(format!(" -> {}", printable(target)).into_bytes());
        }
        text.push(b'\n');
    })?;
    match (heading, context.out.json) {
        (Some(nothing_below), false) => context.out.data(&nothing_below),
        _ => Ok(()),
    }
}

/// The name's own bytes for programs; for a terminal, nothing that could steer it.
fn exact_name(item: &Item) -> Vec<u8> {
    if std::io::stdout().is_terminal() {
        return printable(&item.name).into_owned().into_bytes();
    }
    match item.address.parse() {
        Ok(SdPath::File { path, location, device }) => match (path.last(), location) {
            (Some(name), _) => Name::as_bytes(name).to_vec(),
            (None, Some(location)) => location.into_bytes(),
            (None, None) => device.into_bytes(),
        },
        _ => item.name.clone().into_bytes(),
    }
}

/// Prints each batch when it comes; with `--json` one document, written piece by piece.
fn stream(
    context: &Context,
    request: &Request,
    mut line: impl FnMut(&Item, &mut Vec<u8>),
) -> Outcome<()> {
    let out = context.out;
    let mut json = JsonStream { out, begun: false };
    let done: serde_json::Value = context.client()?.call(request, |event| {
        let Event::Items(items) = event else { return super::unexpected(event) };
        if out.json {
            json.write(&items)?;
        } else {
            let mut text = Vec::new();
            items.iter().for_each(|item| line(item, &mut text));
            out.raw(&text)?;
        }
        Ok(None)
    })?;
    match out.json {
        true => json.end(&done),
        false => Ok(()),
    }
}

/// `{"entries":[…],"address":"…"}`, without holding the entries.
struct JsonStream {
    out: Output,
    begun: bool,
}

impl JsonStream {
    fn write(&mut self, items: &[Item]) -> Outcome<()> {
        let mut text = String::new();
        for item in items {
            text += if self.begun { ",\n" } else { "{\"entries\":[\n" };
            self.begun = true;
            text += &json(item)?;
        }
        self.out.raw(text.as_bytes())
    }

    fn end(&self, done: &serde_json::Value) -> Outcome<()> {
        let begin = if self.begun { "\n" } else { "{\"entries\":[" };
        let address = json(&done["address"])?;
        self.out.data(&format!("{begin}],\"address\":{address}}}"))
    }
}

fn json(value: &impl serde::Serialize) -> Outcome<String> {
    serde_json::to_string(value).map_err(|e| Failure::new(Code::Internal, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_read_as_in_ls() {
        assert_eq!(mode_letters("0644").unwrap(), "rw-r--r--");
        assert_eq!(mode_letters("4755").unwrap(), "rwsr-xr-x");
        assert_eq!(mode_letters("1777").unwrap(), "rwxrwxrwt");
        assert_eq!(mode_letters("2640").unwrap(), "rw-r-S---");
    }
}
