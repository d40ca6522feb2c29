//! Manifests on disk, `manifests/ab/<hex>`: of this device's own files, or in another directory of
//! what its cache lends.
//!
//! Owns that directory. A manifest can always be had again by hashing its file,
//! so a damaged one is dropped and counts as missing. Files of at most one
//! group have none: their proof is empty.

use super::manifest::{GROUP_BYTES, Manifest, ManifestError};
use crate::model::ContentId;
use lru::LruCache;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How much memory the loaded ones may take, the most recent one always included.
const MEMORY_BYTES: usize = 24 << 20;

/// The store of manifests.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    next_temporary: AtomicU64,
    loaded: Mutex<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    manifests: LruCache<ContentId, Arc<Manifest>>,
    bytes: usize,
}

impl Manifests {
    /// Opens the directory, making it if need be, and clears what a crash left half written.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let temporary = dir.join("tmp");
        match fs::remove_dir_all(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => fs::create_dir(&temporary)?,
        }
        Ok(Self {
            dir: dir.to_owned(),
            next_temporary: AtomicU64::new(0),
            loaded: Mutex::new(Loaded { manifests: LruCache::unbounded(), bytes: 0 }),
        })
    }

    /// Stores a manifest; one of a single group needs no storing.
    pub fn put(&self, manifest: &Manifest) -> io::Result<()> {
        if manifest.size() <= GROUP_BYTES {
            return Ok(());
        }
        let path = self.path(manifest.content());
        if path.exists() {
            return Ok(());
        }
        let n = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self.dir.join("tmp").join(n.to_string());
        let written = self.write(&temporary, &path, manifest);
        if written.is_err() {
            // The name may not exist; it is cleared at the next start anyway.
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    /// The same, and what is stored or could not be stays in memory for a while.
    pub(super) fn put_and_load(&self, manifest: Manifest) -> io::Result<()> {
        let stored = self.put(&manifest);
        self.lock().insert(Arc::new(manifest));
        stored
    }

    /// Whether there is one of a content, as far as can be said without reading it.
    pub(super) fn has(&self, content: ContentId) -> bool {
        self.lock().manifests.contains(&content) || self.path(content).exists()
    }

    fn write(&self, temporary: &Path, path: &Path, manifest: &Manifest) -> io::Result<()> {
        fs::create_dir_all(self.dir.join("tmp"))?;
        let mut file = File::create(temporary)?;
        file.write_all(&manifest.to_bytes())?;
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::rename(temporary, path)
    }

    /// The manifest of a content, unless it is missing or damaged.
    pub fn get(&self, content: ContentId) -> Option<Arc<Manifest>> {
        if let Some(found) = self.lock().manifests.get(&content) {
            return Some(found.clone());
        }
        let manifest = Arc::new(self.load(content)?);
        self.lock().insert(manifest.clone());
        Some(manifest)
    }

    fn load(&self, content: ContentId) -> Option<Manifest> {
        let path = self.path(content);
        let bytes = fs::read(&path).ok()?;
        match Manifest::from_bytes(&bytes) {
            Ok(manifest) if manifest.content() == content => return Some(manifest),
            Err(ManifestError::Newer(format)) => {
                tracing::warn!(path = %path.display(), format, "manifest of a newer program");
                return None;
            }
            Ok(_) | Err(ManifestError::Damaged) => {}
        }
        tracing::warn!(path = %path.display(), "damaged manifest dropped");
        let _ = fs::remove_file(&path);
        None
    }

    /// Removes the manifest of a content, if there is one.
    pub fn remove(&self, content: ContentId) -> io::Result<()> {
        let removed = fs::remove_file(self.path(content));
        self.lock().remove(content);
        removed.or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })
    }

    /// Removes the manifests that `keep` does not want; gives the number of bytes freed.
    pub fn prune(&self, keep: &mut dyn FnMut(ContentId) -> bool) -> io::Result<u64> {
        let mut freed = 0;
        for directory in fs::read_dir(&self.dir)? {
            let directory = directory?;
            if directory.file_name() == "tmp" || !directory.file_type()?.is_dir() {
                continue;
            }
            for file in fs::read_dir(directory.path())? {
                freed += self.prune_one(&file?, keep)?;
            }
        }
        Ok(freed)
    }

    fn prune_one(
        &self,
        file: &fs::DirEntry,
        keep: &mut dyn FnMut(ContentId) -> bool,
    ) -> io::Result<u64> {
        let content = file.file_name().to_str().and_then(ContentId::from_hex);
        if content.is_some_and(&mut *keep) {
            return Ok(0);
        }
        let size = file.metadata()?.len();
        fs::remove_file(file.path())?;
        if let Some(content) = content {
            self.lock().remove(content);
        }
        Ok(size)
    }

    /// Reads every manifest, and has the damaged ones removed if that is wanted; gives how many
    /// there are, and how many of them are damaged. `hear` may end it.
    pub fn audit(
        &self,
        removes: bool,
        hear: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> io::Result<(u64, u64)> {
        let (mut files, mut damaged) = (0, 0);
        for directory in fs::read_dir(&self.dir)? {
            let directory = directory?;
            if directory.file_name() == "tmp" || !directory.file_type()?.is_dir() {
                continue;
            }
            for file in fs::read_dir(directory.path())? {
                files += 1;
                damaged += u64::from(is_damaged(&file?, removes)?);
                if hear(files).is_break() {
                    return Ok((files, damaged));
                }
            }
        }
        Ok((files, damaged))
    }

    fn path(&self, content: ContentId) -> PathBuf {
        let hex = content.to_string();
        self.dir.join(&hex[..2]).join(hex)
    }

    fn lock(&self) -> MutexGuard<'_, Loaded> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a stored manifest is none, or another's.
fn is_damaged(file: &fs::DirEntry, removes: bool) -> io::Result<bool> {
    let bytes = match fs::read(file.path()) {
        // Pruned meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        read => read?,
    };
    let is_sound = match Manifest::from_bytes(&bytes) {
        Ok(manifest) => file.file_name().to_str() == Some(&manifest.content().to_string()),
        Err(ManifestError::Newer(_)) => true,
        Err(ManifestError::Damaged) => false,
    };
    if !is_sound && removes {
        fs::remove_file(file.path())?;
    }
    Ok(!is_sound)
}

impl Loaded {
    fn insert(&mut self, manifest: Arc<Manifest>) {
        self.remove(manifest.content());
        self.bytes += manifest.memory_bytes();
        self.manifests.put(manifest.content(), manifest);
        while self.bytes > MEMORY_BYTES && self.manifests.len() > 1 {
            let Some((_, oldest)) = self.manifests.pop_lru() else { break };
            self.bytes -= oldest.memory_bytes();
        }
    }

    fn remove(&mut self, content: ContentId) {
        if let Some(old) = self.manifests.pop(&content) {
            self.bytes -= old.memory_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(seed: u8) -> Manifest {
        Manifest::of_bytes(&vec![seed; 3 * GROUP_BYTES as usize]).1
    }

    #[test]
    fn stored_found_again_and_pruned() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (manifest(1), manifest(2));
        let manifests = Manifests::open(dir.path()).unwrap();
        manifests.put(&a).unwrap();
        manifests.put(&b).unwrap();
        let manifests = Manifests::open(dir.path()).unwrap();
        assert_eq!(*manifests.get(a.content()).unwrap(), a);
        let freed = manifests.prune(&mut |id| id == b.content()).unwrap();
        assert_eq!(freed, a.to_bytes().len() as u64);
        assert_eq!(manifests.get(a.content()), None);
        assert_eq!(*manifests.get(b.content()).unwrap(), b);
    }

    #[test]
    fn a_damaged_one_counts_as_missing_and_can_be_stored_again() {
        let dir = tempfile::tempdir().unwrap();
        let a = manifest(1);
        let manifests = Manifests::open(dir.path()).unwrap();
        manifests.put(&a).unwrap();
        let path = manifests.path(a.content());
        let mut bytes = fs::read(&path).unwrap();
        bytes[70] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(manifests.get(a.content()), None);
        manifests.put(&a).unwrap();
        assert_eq!(*manifests.get(a.content()).unwrap(), a);
    }

    #[test]
    fn an_audit_finds_the_damaged_ones_and_removes_them_when_it_may() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (manifest(1), manifest(2));
        let manifests = Manifests::open(dir.path()).unwrap();
        manifests.put(&a).unwrap();
        manifests.put(&b).unwrap();
        let audit = |removes| manifests.audit(removes, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(audit(true), (2, 0));
        // One that is whole, and another file's.
        fs::write(manifests.path(a.content()), b.to_bytes()).unwrap();
        assert_eq!(audit(false), (2, 1));
        assert_eq!(audit(true), (2, 1));
        assert_eq!(audit(false), (1, 0));
        assert_eq!(*manifests.get(b.content()).unwrap(), b);
    }

    #[test]
    fn a_removed_one_is_gone_and_need_not_have_been_there() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (manifest(1), manifest(2));
        let manifests = Manifests::open(dir.path()).unwrap();
        manifests.put(&a).unwrap();
        manifests.put(&b).unwrap();
        assert!(manifests.get(a.content()).is_some());
        manifests.remove(a.content()).unwrap();
        manifests.remove(a.content()).unwrap();
        assert_eq!(manifests.get(a.content()), None);
        assert_eq!(*manifests.get(b.content()).unwrap(), b);
    }

    #[test]
    fn small_files_have_none() {
        let dir = tempfile::tempdir().unwrap();
        let manifests = Manifests::open(dir.path()).unwrap();
        let (content, small) = Manifest::of_bytes(&[7; GROUP_BYTES as usize]);
        manifests.put(&small).unwrap();
        assert_eq!(manifests.get(content), None);
    }
}
