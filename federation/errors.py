"""Numbered errors: every failure a person can meet has a number, a title and a line of what to do.

Rules:

- The number is for ever: a code that is no longer raised is not given to something else.
- The hundreds say whose fact it is: 1xx the study and the command line (from 140 on the bundles, engines, clusters and
  models that it works on), 2xx a site's dataset, 3xx planning and preparation, 4xx training and validation, 5xx rounds
  and the journal, 6xx the link and the network, 7xx the machine (ports, disk, processes).
- They stand in the order of their numbers.
- `found` says what was found and where, with file names and paths: it stays in the house that raised it.
- `scrubbed()` is what may leave a hospital: the number and the title, never `found`.
"""

from __future__ import annotations

from enum import Enum


class Code(Enum):
    """The catalogue: ``NAME = (number, title, what to do)``."""

    # 1xx: the study and the command line; from 140 on the bundles, engines, clusters and models that it works on
    STUDY_UNREADABLE = (101, "The study file cannot be read", "Check that the path exists and holds YAML text.")
    STUDY_INVALID = (
        102,
        "The study is not valid",
        "Correct the fields named above; `fednnunet study check FILE` explains each one.",
    )
    DATASET_ID_UNKNOWN = (
        103,
        "No dataset with this id",
        "Put DatasetNNN_Name under nnUNet_raw, or set nnUNet_raw to the folder that holds it.",
    )
    FOLD_INVALID = (
        104,
        "The fold is missing or not known",
        "Give 0 to 4, 0-4 (the five one after the other) or all (every case trains).",
    )
    OPTION_NOT_FEDERATED = (105, "This nnU-Net option makes no sense in a federation", "Leave the option out.")
    SITES_MISMATCH = (
        106,
        "The sites given do not match the study",
        "Give one --site NAME=PATH for each name under `sites` in the study, and no other.",
    )
    NOT_PLANNED = (
        107,
        "These datasets have not been planned",
        "Run `fednnunet simulate plan_and_preprocess` with the same ids and plans name first.",
    )
    CONTRACTS_DIFFER = (
        108,
        "The sites' datasets do not agree",
        "Make channel_names, labels and file_ending in every dataset.json the same.",
    )
    TOO_FEW_CASES_FOR_FOLDS = (
        109,
        "Too few training cases for five folds",
        "Use fold all, or give the site at least 5 training cases.",
    )
    NOTHING_TO_CONTINUE = (110, "There is no earlier run to continue", "Leave out --c to start from the beginning.")
    PRETRAINED_UNREADABLE = (
        111,
        "The pretrained weights cannot be used",
        "Give a checkpoint file of nnU-Net v2 whose network fits this configuration.",
    )
    SETTINGS_INVALID = (112, "A setting is not valid", "Correct the setting named above in its file or variable.")
    STATE_NOT_READY = (113, "The state folder is not ready", "Follow the step named above, then start again.")
    INVITATION_INVALID = (
        114,
        "The invitation cannot be used",
        "Ask the coordinator to send the file again, as a file and not as text in a mail.",
    )
    INVITATION_EXPIRED = (
        115,
        "The invitation is not valid at this time",
        "Check this machine's clock; ask the coordinator for a new invitation.",
    )
    INVITATION_USED = (116, "The invitation has been used", "Make a new one with `fednnunet site invite`.")
    INVITATION_UNKNOWN = (
        117,
        "No invitation here fits the request",
        "Invite the site again with `fednnunet site invite`, and tell the hospital that somebody has tried.",
    )
    REQUEST_INVALID = (
        118,
        "The request cannot be used",
        "Ask the hospital to run `appliance enroll` again and to send the new file as it is.",
    )
    REQUEST_WAITING = (
        119,
        "Another request with another key waits already",
        "Call each other: one of the two is not the hospital's. `fednnunet site refuse` takes the waiting one away.",
    )
    STUDY_NOT_FOUND = (120, "No such study, or several", "Give the name or the first letters of the id of one study.")
    STUDIES_NOT_COMPARABLE = (
        121,
        "These studies cannot be compared",
        "Compare studies of one dataset at the same sites, fold 0-4, each with a score from every site.",
    )
    FIRST_STAGE_NOT_TRAINED = (
        122,
        "There is no finished 3d_lowres study to start the cascade from",
        "Train 3d_lowres with fold 0-4 or all first, with the same ids, plans and trainer.",
    )
    SITE_UNKNOWN = (123, "No such site takes part", "`fednnunet site list` names those that do.")
    SITE_TAKEN = (
        124,
        "The name or the key belongs to a site already",
        "A new key for a site: `fednnunet site renew`. A key that was revoked or replaced never comes back.",
    )
    FINGERPRINT_DIFFERS = (
        125,
        "The key was not confirmed",
        "Have the hospital read its words and digits from `appliance identity`; approve only what is the same.",
    )
    REGISTRY_DAMAGED = (
        126,
        "An entry of the registry is damaged",
        "Restore the file named above from a backup, or take it away and invite the site again.",
    )
    CERTIFICATE_EXPIRES = (
        127,
        "A certificate has expired or will soon",
        "Server: `fednnunet federation rotate STATE certificate`. CA: plan for new invitations to all sites.",
    )
    SITE_BUSY = (128, "The site takes part in a study that is under way", "Wait until the study has ended.")
    OUTPUT_EXISTS = (129, "The output is there already", "Name a file or folder that does not exist yet.")
    STUDY_UNKNOWN_HERE = (
        130,
        "No study, or several, with this name or id",
        "`appliance studies` lists those asked for here.",
    )
    CONFIG_MISSING = (
        131,
        "There is no site.toml",
        "Mount the folder that `appliance enroll` wrote (-v CONFIG:/config:ro), or name the file with --config.",
    )
    BACKUP_RESTLESS = (
        132,
        "A study wrote without a pause and could not be copied",
        "Try the backup again in a minute.",
    )
    BUNDLE_UNREADABLE = (140, "The file is not an image bundle", "Give a file that `fednnunet image save` wrote.")
    BUNDLE_CHANGED = (
        141,
        "The bundle is damaged or has been changed",
        "Fetch the file again; compare its SHA-256 with the sender over the phone. Load nothing of it.",
    )
    BUNDLE_MANIFEST_CHANGED = (
        142,
        "The bundle's manifest has been changed",
        "Fetch the file again and tell the sender. Load nothing of it.",
    )
    BUNDLE_SIGNATURE_CHANGED = (
        143,
        "The bundle's signature does not hold",
        "Fetch the file again and tell the sender. Load nothing of it.",
    )
    LAYER_MISSING = (
        144,
        "A layer of the image is missing",
        "For a bundle of changed layers give the one it builds on with --base; else fetch the file again.",
    )
    SIGNER_UNKNOWN = (
        145,
        "The bundle is signed by a key that is not trusted here",
        "Compare words and digits with the sender over the phone; then give that public key with --key.",
    )
    BUNDLE_DATES = (
        146,
        "The bundle is not valid at this time",
        "Check this machine's clock; ask the sender for a new bundle.",
    )
    OLDER_THAN_INSTALLED = (
        147,
        "The bundle is older than the version that is installed",
        "Load the newest bundle; to go back on purpose, say --allow-downgrade.",
    )
    ENGINE_UNREACHABLE = (
        148,
        "The Docker engine does not answer",
        "Start it, or point DOCKER_HOST at it; `fednnunet image load --to-archive FILE` needs none.",
    )
    IMAGE_UNKNOWN = (149, "No such image", "`fednnunet image list` names those that are there.")
    IMAGE_UNSUITABLE = (
        150,
        "The image cannot be put into a bundle",
        "Build it with `fednnunet image build`, or save it again with the engine.",
    )
    BUILD_FAILED = (151, "The image could not be built", "See the builder's output above.")
    PUSH_FAILED = (152, "The image could not be pushed", "Log in with `docker login`; check the image's name.")
    LOAD_FAILED = (153, "The engine did not take the image", "See the reason above and the engine's log.")
    BUNDLE_KEY_UNUSABLE = (
        154,
        "The key file cannot be used",
        "Make a pair with `fednnunet image keygen`; sign with the .key, verify with the .pub.",
    )
    BUNDLE_UNSIGNED = (155, "The bundle is not signed", "Sign it with `fednnunet image sign`, where the key is kept.")
    MODEL_UNUSABLE = (
        156,
        "The model cannot be used",
        "Give nnU-Net's folder TRAINER__PLANS__CONFIGURATION, a folder that holds a single one, or an exported zip.",
    )
    NOTHING_TO_PREDICT = (
        157,
        "There is no image to predict",
        "Give the folder that holds CASE_0000.nii.gz (and _0001, ... for further channels).",
    )
    PREDICTED_OTHERWISE = (
        158,
        "The output folder holds predictions that were made otherwise",
        "Give another folder; or --overwrite, which removes those predictions.",
    )
    CLUSTER_UNREACHABLE = (159, "The cluster cannot be reached", "Check KUBECONFIG, --context and the network.")
    CLUSTER_REFUSED = (160, "The cluster refuses this", "See the reason above; ask who runs the cluster.")
    CHART_REFUSED = (161, "The chart cannot be rendered", "Correct the value that is named above.")
    JOB_UNKNOWN = (
        162,
        "No such prediction is in the cluster",
        "`fednnunet predict submit` makes one; check --namespace.",
    )
    TRACKER_REFUSED = (
        163,
        "The tracking server does not take the curves",
        "Check --mlflow and that the server runs; the same command goes on where it stopped.",
    )

    # 2xx: a site's dataset
    DATASET_JSON_MISSING = (201, "dataset.json is missing", "Mount the folder that holds dataset.json and imagesTr.")
    DATASET_JSON_INVALID = (202, "dataset.json cannot be used", "Write it as nnU-Net's dataset format document says.")
    CHANNELS_DIFFER = (203, "The channels differ from the study's", "Agree on channel_names with the coordinator.")
    LABELS_DIFFER = (
        204,
        "The labels differ from the study's",
        "Agree on labels (names and numbers) with the coordinator.",
    )
    FILE_ENDING_DIFFERS = (
        205,
        "The file ending differs from the study's",
        "Convert the images, or agree on one ending.",
    )
    CASE_COUNT_DIFFERS = (
        206,
        "numTraining is not the number of cases found",
        "Correct numTraining, or add the missing files.",
    )
    IMAGE_WITHOUT_LABEL = (207, "An image has no label", "Add the label to labelsTr or take the image out of imagesTr.")
    LABEL_WITHOUT_IMAGE = (208, "A label has no image", "Add the image to imagesTr or take the label out of labelsTr.")
    CHANNEL_MISSING = (209, "A case lacks a channel", "Every case needs one file for each channel (_0000, _0001, ...).")
    FILE_UNREADABLE = (210, "A file cannot be read as an image", "Copy the file again from its source.")
    LFS_POINTER = (211, "A file is a Git LFS pointer, not an image", "Run `git lfs pull` where the data came from.")
    SHAPES_DIFFER = (212, "Image and label differ in shape", "Use the label that was drawn on this image.")
    SPACINGS_DIFFER = (
        213,
        "Image and label differ in spacing",
        "Resample the label to its image, or correct the header.",
    )
    LABEL_VALUES = (214, "A label holds values that the study does not know", "Map the values to the study's labels.")
    LABEL_INTERPOLATED = (
        215,
        "A label looks like a grey or anti-aliased mask",
        "Threshold the mask again from its source; do not interpolate masks.",
    )
    LABEL_FLOAT = (
        216,
        "A label is stored as floating point",
        "Store it as integers, or set `accept_float_labels: true` in the study.",
    )
    IMAGE_NOT_FINITE = (
        217,
        "An image holds NaN or infinite values",
        "Export the image again, or replace these voxels.",
    )
    DUPLICATE_IMAGE = (218, "Two cases hold the same image", "Remove one of them.")
    DICOM_FOUND = (219, "DICOM files where the study expects images", "Convert each series to one file first.")
    DICOM_SLICE_MISSING = (220, "A DICOM series lacks slices", "Fetch the series again before you convert it.")
    NO_CASES = (221, "The dataset has no training case", "Check that imagesTr and labelsTr are where the mount points.")
    NO_FOREGROUND = (222, "No case has any foreground", "Check that the labels were exported with their values.")
    TOO_FEW_CASES_TO_SHARE = (
        223,
        "Fewer cases than the study's fingerprint_min_cases",
        "The site cannot send a fingerprint under this rule; agree on a smaller number, or take no part.",
    )
    STRAY_FILE = (224, "A file that is not an image lies among the images", "Remove it; nnU-Net ignores it.")
    POSITION_DIFFERS = (
        225,
        "Image and label differ in origin or direction",
        "Look at them in an overlay (nnUNetv2_plot_overlay_pngs); nnU-Net uses the voxels as they lie.",
    )
    READER_DIFFERS = (
        226,
        "dataset.json asks for another reader than the study's",
        "Agree with the coordinator on overwrite_image_reader_writer in the study: all sites must read alike, for the "
        "order of the axes is the reader's. Or take it out of dataset.json.",
    )

    # 3xx: planning and preparation
    PLANNING_FAILED = (301, "nnU-Net could not make a plan", "See the reason above; change the planner or its options.")
    PLANS_HASH = (
        302,
        "The plans are not those that the orchestrator signed for",
        "Ask the coordinator to start again.",
    )
    CONFIGURATION_MISSING = (
        303,
        "The plans hold no such configuration",
        "Choose one of the configurations that nnU-Net planned, named above.",
    )
    PREPROCESSING_FAILED = (304, "Preprocessing failed", "See the log at the site for the case and the reason.")
    PLANS_REFUSED = (305, "The plans name something that is not nnU-Net's own", "Plan again with nnU-Net's planners.")
    MODEL_NOT_BUILT = (306, "The network or the model could not be made from the plans", "See the reason above.")
    NETWORKS_DIFFER = (
        308,
        "The sites' networks cannot be averaged",
        "Agree on one configuration that fits every site's images, or leave the site named above out.",
    )
    NOTHING_SHARED = (
        309,
        "A site shares no layer with any other",
        "Use mode ffe, set overwrite_target_spacing so that the plans come closer, or leave the site out.",
    )
    FIRST_STAGE_MISSING = (
        310,
        "The finished 3d_lowres model of the study's previous_stage is not at this site",
        "Finish a study of 3d_lowres with fold 0-4 or all at this site first, or leave the site out.",
    )
    FIRST_STAGE_DIFFERS = (
        311,
        "The study's previous_stage does not fit it",
        "Name a finished study of 3d_lowres, fold 0-4 or all, with the same dataset and planning, of the same sites.",
    )
    FIRST_STAGE_CASES = (
        312,
        "The training cases are not those of the first stage",
        "Give the site the cases it had, or train 3d_lowres again with those it has now.",
    )

    # 4xx: training and validation
    TRAINING_FAILED = (401, "Training failed at a site", "The traceback is in the site's log.")
    OUT_OF_MEMORY = (
        402,
        "The device ran out of memory",
        "Free the GPU, or plan with a smaller -gpu_memory_target.",
    )
    TRAINER_UNKNOWN = (
        403,
        "This trainer cannot be used",
        "Use nnUNetTrainer or one of its variants shipped with nnU-Net.",
    )
    WEIGHTS_DO_NOT_FIT = (404, "The weights do not fit the network", "All sites must run the same version and plans.")
    TASK_FAILED = (405, "A task failed at a site", "The traceback is in the site's log.")
    VALIDATION_FAILED = (406, "Validation failed at a site", "The traceback is in the site's log.")
    LOSS_NOT_FINITE = (
        407,
        "The loss became NaN or infinite",
        "Look for broken images; try a trainer with a smaller rate.",
    )
    BASE_MISSING = (408, "The site lacks the weights that a difference refers to", "Nothing: they are sent in full.")
    CANCELLED = (409, "The task was cancelled", "Nothing, if the study was stopped on purpose.")
    PREDICTION_FAILED = (410, "A case could not be predicted", "Mend what the reason names; the same command goes on.")
    NOT_ALL_PREDICTED = (
        411,
        "Not every image has a prediction",
        "Mend what the reasons name and give the same command again: it does what is missing.",
    )
    WORKER_DIED = (
        412,
        "The worker died at this task again and again",
        "Mostly memory ran out (the kernel's log says so): give the machine more, or set fewer processes in site.toml.",
    )

    # 5xx: rounds and the journal
    SITE_NEVER_APPEARED = (
        501,
        "A site of the study never appeared",
        "Start its appliance, check its log, then run the same command again: the study goes on.",
    )
    SITE_FAILED = (502, "A site could not do its part", "Mend what its code names, then run the same command again.")
    QUORUM_NOT_MET = (
        503,
        "Too few sites gave an answer that counts",
        "Mend what is said of each site, or bring it back; then run the same command again. Or lower `quorum`.",
    )
    JOURNAL_DAMAGED = (504, "The journal has been changed or is damaged", "Restore the state folder from a backup.")
    UPDATE_REFUSED = (505, "A site's update was refused", "See the reason above; the update is kept in quarantine.")
    STUDY_FAILED = (506, "The study has failed", "See the reason above; the same command starts it again.")
    RESULT_REFUSED = (507, "A site's answer was refused", "See the reason above; check the site's version.")
    SITE_NOT_REGISTERED = (
        508,
        "An answer of a site that is not registered, or was revoked",
        "`fednnunet site list` says who takes part; let the site in, or leave it out of the study.",
    )
    STUDY_STOPPED = (
        509,
        "The study was stopped before its end",
        "`fednnunet study resume STUDY --state STATE`; a simulation: the same `fednnunet simulate` command again.",
    )

    # 6xx: the link and the network
    BUNDLE_REFUSED = (
        601,
        "The app bundle is not the one this version ships with",
        "Install the same version everywhere.",
    )
    TASK_REFUSED = (
        602,
        "The task does not belong to this site",
        "Check the site names in the orchestrator's registry.",
    )
    WEIGHTS_DAMAGED = (603, "Weights arrived damaged", "Nothing: they are asked for again.")
    ORCHESTRATOR_UNREACHABLE = (
        604,
        "The orchestrator does not answer",
        "Check its address, its certificate and the firewall.",
    )
    ENVELOPE_INVALID = (605, "A message cannot be understood", "Install the same version everywhere.")
    CERTIFICATE_UNTRUSTED = (
        606,
        "The certificate is not signed by this federation",
        "Something between may open TLS: have this address pass unopened, or give that CA with --ca.",
    )
    CERTIFICATE_DATES = (
        607,
        "The certificate is not valid at this time",
        "Check this machine's clock. Coordinator: `fednnunet federation status`, then `rotate ... certificate`.",
    )
    CERTIFICATE_NAME = (
        608,
        "The certificate is for another name",
        "Dial a name that the certificate holds, or make the server's certificate anew with this name.",
    )
    ENROLLMENT_REFUSED = (
        609,
        "The orchestrator did not take the request",
        "Wait a minute and try again; or send the request as a file.",
    )
    NAME_NOT_RESOLVED = (610, "A name has no address", "Compare the name; ask IT which DNS server to use.")
    PORT_NOT_REACHED = (611, "The orchestrator cannot be dialled", "Ask IT to let this machine dial it.")
    PROXY_REFUSED = (612, "The proxy does not open the way", "Compare HTTPS_PROXY with what IT gave.")
    CA_CERTIFICATE_UNUSABLE = (
        614,
        "The federation's CA certificate cannot be used",
        "Put the ca.crt of the coordinator's invitation where ca_certificate points.",
    )
    TLS_FAILED = (615, "No TLS comes about", "Check the port; ask IT whether a firewall cuts TLS.")
    LINE_TOO_SLOW = (616, "The line is too slow for a study", "Ask IT for more bandwidth.")
    NOT_LET_IN = (
        617,
        "The orchestrator does not let this site in",
        "Nothing here, if the request is on its way: this appliance asks again until the coordinator has approved it. "
        "Else ask the coordinator whether the site was revoked, and whether its key is in use on another machine.",
    )
    SIGNATURE_REFUSED = (
        620,
        "A message without a signature that holds",
        "Compare the coordinator's and the site's keys; somebody between may have changed the message.",
    )
    TASK_REPLAYED = (
        621,
        "A task of the past was sent again",
        "Nothing, if the study goes on. Where the orchestrator was restored from a backup: `appliance rewind STUDY`.",
    )
    STUDY_NOT_APPROVED = (
        622,
        "The study waits for the hospital's approval",
        "Hospital IT: `appliance studies`, then `appliance approve STUDY`. Coordinator: then submit the study again.",
    )
    STUDY_DENIED = (623, "The hospital has denied this study", "Ask the hospital.")
    POLICY_REFUSED = (
        624,
        "The site's policy does not allow this",
        "Ask the hospital; its policy.toml says what it allows.",
    )

    # 7xx: the machine
    PORT_IN_USE = (701, "A port is in use", "Stop the program that holds it, or choose other ports.")
    DISK_FULL = (702, "The disk is full or not writable", "Free space or mend the mount; the same command goes on.")
    PROCESS_DIED = (703, "A process ended again and again", "Its log, named above, says why.")
    EXTRA_MISSING = (704, "A part of the installation is missing", "Install the extra named above with pip.")
    ALREADY_RUNNING = (705, "Another process uses this state folder", "Wait for it, stop it, or use another --state.")
    DEVICE_MISSING = (
        706,
        "The device is not there",
        "Choose the device cpu, or check the driver and the container's GPU flags.",
    )
    WORKER_NETWORK = (707, "The worker tried to use the network", "Report this: the worker has no business there.")
    CLOCK_OFF = (
        708,
        "This machine's clock is off",
        "Let it keep its time by NTP; a container has its host's clock.",
    )
    VERSION_DIFFERS = (
        709,
        "A package has another version than the release was tested with",
        "Install with pip install -c constraints.txt, or use the image.",
    )
    GPU_TOO_SMALL = (
        710,
        "The GPU has less memory than the plan may fill",
        "Use a larger GPU, or ask for a smaller gpu_memory_target.",
    )
    MEMORY_SMALL = (711, "There is little memory", "Give the container more, or use fewer processes.")
    SHARED_MEMORY_SMALL = (
        712,
        "Shared memory (/dev/shm) is too small for the loaders",
        "Start the container with --shm-size=8g, or set augmentation_processes = 0.",
    )
    DISK_SMALL = (713, "The disk may not hold the study", "Free space, or mount a larger disk as the state folder.")
    KEY_EXPOSED = (714, "Others may read the site's private key", "chmod 600 the key file.")
    KEY_UNUSABLE = (715, "The site's private key cannot be used", "Make it with `appliance enroll`.")
    DATA_WRITABLE = (716, "The data could be written", "Mount it read-only.")
    TRIAL_FAILED = (717, "A trial in a child process failed", "The end of its output, named above, says why.")
    CHECK_CRASHED = (718, "A check crashed", "Report this, with the output above.")
    CHECK_TIMED_OUT = (719, "A check did not end in time", "Look for a mount or a device that hangs; then ask again.")
    RUNS_AS_ROOT = (720, "The appliance runs as root", "Run it as an ordinary user.")
    MOUNT_UNREADABLE = (721, "A mount cannot be read", "Let the appliance's user read it.")
    NOT_RUNNING = (722, "Not all processes run", "Look at the log; the supervisor starts again what has ended.")
    NOT_READY = (723, "The orchestrator runs but cannot do its work", "Mend what is named above; the log has more.")

    @property
    def number(self) -> int:
        """The three-digit number."""
        return self.value[0]

    @property
    def title(self) -> str:
        """One sentence that names no file, path or person: it may leave the house."""
        return self.value[1]

    @property
    def advice(self) -> str:
        """What to do about it."""
        return self.value[2]

    @classmethod
    def of(cls, number: int) -> Code:
        """The code with this number; raises ``KeyError``."""
        for code in cls:
            if code.number == number:
                return code
        raise KeyError(number)


class FednnunetError(Exception):
    """A failure a person can do something about.

    Parameters
    ----------
    code : Code
        The entry of the catalogue.
    found : str
        What was found and where. It may name files; it does not leave the house.
    advice : str, optional
        Replaces the catalogue's line where more is known.
    """

    def __init__(self, code: Code, found: str = "", advice: str = "") -> None:
        self.code = code
        self.found = found
        self.advice = advice or code.advice
        super().__init__(self.scrubbed() + (f": {found}" if found else ""))

    def __reduce__(self) -> tuple[type[FednnunetError], tuple[Code, str, str]]:
        """Crosses a process pool whole."""
        return type(self), (self.code, self.found, self.advice)

    def scrubbed(self) -> str:
        """Number and title alone: what may leave a hospital."""
        return f"FNU-{self.code.number} {self.code.title}"

    @property
    def exit_status(self) -> int:
        """Exit status of a command: 10 + the hundreds of the number."""
        return 10 + self.code.number // 100
