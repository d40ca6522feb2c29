//! Addresses: `sd://<device>/<location>/<path>` and `sd://content/<blake3-hex>`.
//!
//! Names are bytes. In the text form every byte that is not an unreserved URL
//! character or printable UTF-8 is `%xx`, so that an address survives a shell,
//! a log and JSON; parsing accepts both forms.

use crate::model::{ContentId, Name};
use std::fmt;

/// A parsed address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SdPath {
    /// `sd://`: all devices.
    Root,
    /// `sd://<device>/<location>/<path>`; without a location, the device's directory.
    File {
        /// The device's name.
        device: String,
        /// The location's name.
        location: Option<String>,
        /// Components below the location's folder.
        path: Vec<Name>,
    },
    /// `sd://content/<blake3-hex>`: whatever has these bytes.
    Content(ContentId),
}

impl SdPath {
    /// The address of an entry of this directory; of the root, of a device whose name is UTF-8.
    pub fn child(&self, name: &Name) -> Self {
        match self {
            Self::Root => {
                Self::File { device: name.display().into_owned(), location: None, path: vec![] }
            }
            Self::File { device, location: None, .. } => {
                let location = Some(name.display().into_owned());
                Self::File { device: device.clone(), location, path: vec![] }
            }
            Self::File { device, location, path } => {
                let path = path.iter().chain([name]).cloned().collect();
                Self::File { device: device.clone(), location: location.clone(), path }
            }
            Self::Content(id) => Self::Content(*id),
        }
    }
}

/// Why a text is not an address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SdPathError {
    /// It does not start with `sd://`.
    #[error("an address starts with sd://")]
    Scheme,
    /// What follows `sd://content/` is not a BLAKE3 hash.
    #[error("sd://content/ is followed by 64 hexadecimal digits")]
    Content,
    /// A component is empty, `.`, `..`, too long, or has a NUL.
    #[error("“{0}” is not a file name")]
    Name(String),
}

impl std::str::FromStr for SdPath {
    type Err = SdPathError;

    fn from_str(text: &str) -> Result<Self, SdPathError> {
        let rest = text.strip_prefix("sd://").ok_or(SdPathError::Scheme)?;
        if let Some(hex) = rest.strip_prefix("content/") {
            return ContentId::from_hex(hex).map(Self::Content).ok_or(SdPathError::Content);
        }
        let mut parts = rest.split('/').filter(|p| !p.is_empty());
        let Some(device) = parts.next() else { return Ok(Self::Root) };
        let device = utf8_component(device)?;
        let location = parts.next().map(utf8_component).transpose()?;
        let path = parts.map(component).collect::<Result<_, _>>()?;
        Ok(Self::File { device, location, path })
    }
}

fn component(text: &str) -> Result<Name, SdPathError> {
    Name::new(percent_decode(text)).ok_or_else(|| SdPathError::Name(text.to_owned()))
}

fn utf8_component(text: &str) -> Result<String, SdPathError> {
    let name = component(text)?;
    String::from_utf8(name.as_bytes().to_vec()).map_err(|_| SdPathError::Name(text.to_owned()))
}

fn percent_decode(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = bytes.get(i + 1..i + 3).and_then(|h| std::str::from_utf8(h).ok());
        match (bytes[i], hex.and_then(|h| u8::from_str_radix(h, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                i += 3;
            }
            (byte, _) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    out
}

fn percent_encode(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '%' | '/' => write!(f, "%{:02X}", c as u32)?,
                c if c.is_control() => {
                    let mut buffer = [0; 4];
                    for byte in c.encode_utf8(&mut buffer).bytes() {
                        write!(f, "%{byte:02X}")?;
                    }
                }
                c => write!(f, "{c}")?,
            }
        }
        for byte in chunk.invalid() {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}

impl fmt::Display for SdPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sd://")?;
        match self {
            Self::Root => Ok(()),
            Self::Content(id) => write!(f, "content/{id}"),
            Self::File { device, location, path } => {
                percent_encode(f, device.as_bytes())?;
                for part in
                    location.iter().map(|l| l.as_bytes()).chain(path.iter().map(Name::as_bytes))
                {
                    f.write_str("/")?;
                    percent_encode(f, part)?;
                }
                Ok(())
            }
        }
    }
}

/// Why a text cannot name a device or a location.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LabelError {
    /// Empty, longer than 64 characters, or not a file name.
    #[error("a name has 1 to 64 characters, none of them “/”, and is not “.” or “..”")]
    Form,
    /// It has a control character, or one that hides or turns round others.
    #[error("a name has no control characters and no invisible ones")]
    Control,
    /// `content`, which addresses use.
    #[error("“content” is reserved for addresses by content")]
    Reserved,
}

/// Whether a character makes text look like other text: control characters, and those that
/// have no width or turn the direction of what follows (`a\u{202e}gpj.exe`).
pub fn misleads(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// Checks the name of a device or location: it becomes a directory name and part of addresses.
pub fn check_label(label: &str) -> Result<(), LabelError> {
    if label.chars().count() > 64 || !Name::is_valid(label.as_bytes()) {
        return Err(LabelError::Form);
    }
    if label.chars().any(misleads) {
        return Err(LabelError::Control);
    }
    match label {
        "content" => Err(LabelError::Reserved),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_survives_the_text_form() {
        for name in
            [&b"plain"[..], b"new\nline", b"back\\slash", b"100%", b"\xff\xfe", "ä ö".as_bytes()]
        {
            let path = SdPath::File {
                device: "my laptop".into(),
                location: Some("photos".into()),
                path: vec![Name::new(name).unwrap()],
            };
            assert_eq!(path.to_string().parse(), Ok(path));
        }
    }

    #[test]
    fn dot_dot_is_not_a_component() {
        assert_eq!("sd://a/b/..".parse::<SdPath>(), Err(SdPathError::Name("..".into())));
        assert_eq!("sd://a/b/%2E%2E".parse::<SdPath>(), Err(SdPathError::Name("%2E%2E".into())));
        assert_eq!("sd://a/b/x%2Fy".parse::<SdPath>(), Err(SdPathError::Name("x%2Fy".into())));
    }

    #[test]
    fn a_label_has_nothing_that_hides_or_turns_round() {
        for label in ["a\nb", "a\u{202e}gpj.exe", "lap\u{200b}top", "\u{feff}nas", "a\u{2066}b"] {
            assert_eq!(check_label(label), Err(LabelError::Control), "{label:?}");
        }
        for label in ["Ada’s laptop", "חדר עבודה", "写真", "größe"] {
            assert_eq!(check_label(label), Ok(()), "{label:?}");
        }
    }
}
