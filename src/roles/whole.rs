//! Mounts images that are whole on disk in the kernel, out of files that the agent gives.
//!
//! The agent has no rights, and what it gives is believed as little: the index is copied before it is looked at, so
//! that nobody changes or cuts it meanwhile, and `erofs` checks all of it. What the agent could do is what
//! it can do anyway: give wrong bytes of layers, whose files are its own.

use std::{
    fs::{File, remove_file},
    io::{self, Read as _},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use tracing::warn;

use super::protocol::{AgentReply, AgentRequest, ImageFile};
use crate::{
    disk,
    erofs::{self, ErofsError, LayerFiles, METADATA_NAME},
    failpoint,
    index::image::ImageIndex,
    ipc::Channel,
    sys::{self, MappedFile},
};

/// How long the agent may take for all answers: it looks at some files.
const ANSWERS: Duration = Duration::from_secs(10);

/// Largest index that is copied: twice what the most inodes of such a mount take.
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// Most layers that are taken from the agent: four times as many as container runtimes do.
const MAX_LAYERS: usize = 512;

/// Mounts the image that was prepared on the connection `agent` at `dir`, whose parent is a directory of its own.
///
/// # Errors
/// As for [`ImageMounter::mount_in_kernel`](crate::mount::ImageMounter::mount_in_kernel); `InvalidData` if there is
/// something about the image.
///
/// # Blocking
/// Waits for the agent, and writes the metadata.
pub(super) fn mount(agent: &Channel, dir: &Path) -> io::Result<()> {
    let (index, layers) = ask(agent)?;
    let own = dir.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let index = MappedFile::new(&copied(index, own)?)?;
    let index = ImageIndex::open(index).map_err(io::Error::other)?;
    check(&index, &layers)?;
    let path = own.join(METADATA_NAME);
    // Left by a process that died just there.
    let _ = remove_file(&path);
    let metadata = File::create_new(&path)?;
    let mounted = erofs::write(&index, &metadata)
        .map_err(|err| match err {
            ErofsError::Io(err) => err,
            ErofsError::Unfit { .. } | ErofsError::Damaged { .. } => invalid(err),
        })
        .and_then(|()| {
            failpoint::reached("kernel:written");
            erofs::mount(&path, &layers, dir)
        });
    failpoint::reached("kernel:mounted");
    // The kernel has it open.
    if let Err(err) = remove_file(&path) {
        warn!(path = %path.display(), error = %err, "metadata of a mount stay");
    }
    drop(index);
    sys::drop_code();
    mounted
}

/// Asks for the image's index and its layers.
fn ask(agent: &Channel) -> io::Result<(File, Vec<LayerFiles>)> {
    let deadline = Instant::now() + ANSWERS;
    agent.send(&AgentRequest::Files, None)?;
    let (mut index, mut data, mut layers) = (None, None, Vec::new());
    loop {
        let unexpected = || io::Error::other("the agent gave files in another order");
        let left = deadline.checked_duration_since(Instant::now());
        let left = left.filter(|it| !it.is_zero());
        agent.set_receive_timeout(Some(left.ok_or(io::ErrorKind::TimedOut)?))?;
        let (reply, file): (AgentReply, Option<OwnedFd>) = match agent.receive()? {
            Some(received) => received,
            None => return Err(io::ErrorKind::ConnectionReset.into()),
        };
        match (reply, file) {
            (AgentReply::File(ImageFile::Index), Some(file)) if index.is_none() => {
                // Before it is read: whoever reads a pipe waits.
                erofs::check_file(file.as_fd())?;
                index = Some(file.into());
            }
            (AgentReply::File(ImageFile::Data), Some(file)) if data.is_none() => data = Some(file),
            (AgentReply::File(ImageFile::Mounted), Some(mounted)) => {
                if layers.len() == MAX_LAYERS {
                    return Err(io::Error::other("the agent gave too many files"));
                }
                let data = data.take().ok_or_else(unexpected)?;
                layers.push(LayerFiles { data, mounted });
            }
            (AgentReply::FilesEnd(Ok(())), _) => {
                return Ok((index.ok_or_else(unexpected)?, layers));
            }
            (AgentReply::FilesEnd(Err(reason)), _) => return Err(io::Error::other(reason)),
            (_, _) => return Err(unexpected()),
        }
    }
}

/// Copies the index to a file without a name.
fn copied(index: File, dir: &Path) -> io::Result<File> {
    let copy = disk::nameless(dir)?;
    let copied_bytes = disk::copy_to_map(index.take(MAX_INDEX_BYTES), &copy)?;
    if copied_bytes == MAX_INDEX_BYTES {
        return Err(invalid("the image's index is too large to be mounted so"));
    }
    Ok(copy)
}

fn invalid(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Checks that the files of layers are those that the index speaks of, as far as their sizes can say.
fn check(index: &ImageIndex<MappedFile>, layers: &[LayerFiles]) -> io::Result<()> {
    let mut sizes = layers.iter().map(LayerFiles::layer_bytes);
    let mut wanted = (0..index.n_layers()).map(|it| index.layer(it));
    let is_right = loop {
        match (sizes.next().transpose()?, wanted.next()) {
            (None, None) => break true,
            (Some(bytes), Some(Some(layer))) if bytes == layer.layer_bytes => {}
            (_, _) => break false,
        }
    };
    let reason = "the files of the image's layers are not those of its index";
    is_right.then_some(()).ok_or_else(|| invalid(reason))
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;
    use crate::{
        digest::{BlobDigest, DiffId, ManifestDigest},
        index::{
            layer_index::{LayerIndex, LayerIndexBuilder},
            merge::Merge,
        },
        ipc::Listener,
    };

    /// The index of an image of one layer of so many bytes, and nothing else.
    fn index_of(layer_bytes: u64) -> Vec<u8> {
        let mut builder = LayerIndexBuilder::default();
        builder.push_chunk(&crate::digest::ChunkDigest::of(b""));
        let layer = builder.finish(DiffId::of(b"layer"), layer_bytes);
        let mut merge = Merge::new(10);
        merge
            .add_layer(
                &LayerIndex::decode(layer).unwrap(),
                BlobDigest::of(b"blob"),
                1,
            )
            .unwrap();
        merge.finish(ManifestDigest::of(b"image")).unwrap()
    }

    /// What comes of an agent that gives these files, of this content, and ends so.
    fn mounted(files: &[(ImageFile, &[u8])], end: Result<(), String>) -> io::Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&dir.path().join("agent.sock")).unwrap();
        let own = dir.path().join("own");
        fs::create_dir_all(own.join("kernel")).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let node = listener.accept().unwrap();
                let (request, _) = node.receive::<AgentRequest>().unwrap().unwrap();
                assert!(matches!(request, AgentRequest::Files), "{request:?}");
                for (what, content) in files {
                    disk::publish(&dir.path().join("file"), content).unwrap();
                    let file = File::open(dir.path().join("file")).unwrap();
                    // Whoever has heard enough has closed the connection.
                    let _ = node.send(&AgentReply::File(*what), Some(file.as_fd()));
                }
                let _ = node.send(&AgentReply::FilesEnd(end), None);
            });
            let agent = Channel::connect(&dir.path().join("agent.sock")).unwrap();
            let mounted = mount(&agent, &own.join("kernel"));
            let left = fs::read_dir(&own)
                .unwrap()
                .map(|it| it.unwrap().file_name());
            assert_eq!(left.collect::<Vec<_>>(), ["kernel"]);
            mounted
        })
    }

    #[test]
    fn what_the_agent_gives_is_not_believed() {
        use ImageFile::{Data, Index, Mounted};
        let (index, layer) = (index_of(1024), [0; 1024]);
        let (index, layer) = ((Index, &index[..]), (Data, &layer[..]));
        let marker = (Mounted, &b""[..]);
        let order = "the agent gave files in another order";
        let others = "the files of the image's layers are not those of its index";
        let many: Vec<_> = [index]
            .into_iter()
            .chain([layer, marker].repeat(MAX_LAYERS + 1))
            .collect();
        for (files, expected) in [
            (vec![], order),
            (vec![layer, marker], order),
            (vec![index, marker], order),
            (vec![index, layer], others),
            (vec![index, index], order),
            (vec![index, layer, layer], order),
            (vec![index], others),
            (vec![index, layer, marker, layer, marker], others),
            (vec![index, (Data, b"short"), marker], others),
            (
                vec![(
                    Index,
                    &b"no index, but longer than its head is: 54 bytes would do"[..],
                )],
                "not a clip file: its first bytes are wrong",
            ),
            (many, "the agent gave too many files"),
        ] {
            let err = mounted(&files, Ok(())).unwrap_err().to_string();
            assert_eq!(err, expected);
        }
        let reason = "a layer is not whole any more";
        let err = mounted(&[index], Err(reason.to_owned())).unwrap_err();
        assert_eq!(err.to_string(), reason);
    }

    #[test]
    fn what_is_no_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&dir.path().join("agent.sock")).unwrap();
        let agent = Channel::connect(&dir.path().join("agent.sock")).unwrap();
        let node = listener.accept().unwrap();
        // Whoever reads it waits for as long as there is somebody to write.
        let (pipe, _writer) = io::pipe().unwrap();
        node.send(&AgentReply::File(ImageFile::Index), Some(pipe.as_fd()))
            .unwrap();
        node.send(&AgentReply::FilesEnd(Ok(())), None).unwrap();
        let err = mount(&agent, &dir.path().join("own/kernel")).unwrap_err();
        assert_eq!(err.raw_os_error(), Some(libc::EBADF), "{err}");
    }

    #[test]
    fn an_agent_that_goes_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&dir.path().join("agent.sock")).unwrap();
        let agent = Channel::connect(&dir.path().join("agent.sock")).unwrap();
        drop(listener.accept().unwrap());
        let err = mount(&agent, &dir.path().join("kernel")).unwrap_err();
        assert!(
            matches!(
                err.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            ),
            "{err}"
        );
    }
}
