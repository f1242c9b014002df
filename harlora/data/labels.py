"""One label vocabulary, and what each dataset's own activity names mean in it."""

VOCABULARY = (
    "sit",
    "stand",
    "lie",
    "walk",
    "upstairs",
    "downstairs",
    "run",
    "cycle",
    "jump",
    "nordic_walk",
    "vacuum",
    "iron",
    "rope_jump",
    "stepper",
    "cross_trainer",
    "row",
    "basketball",
)
LABEL_INDEX = {label: index for index, label in enumerate(VOCABULARY)}

_UCI = {
    "WALKING": "walk",
    "WALKING_UPSTAIRS": "upstairs",
    "WALKING_DOWNSTAIRS": "downstairs",
    "SITTING": "sit",
    "STANDING": "stand",
    "LAYING": "lie",
}

# An activity that is not listed has no label here: its windows are dropped and counted, never given a class.
# Left out on purpose: the postural transitions of HAPT (7 to 12), the two lift rides of DSA (a07, a08), what HHAR
# calls null and PAMAP2 numbers 0, and the activities of PAMAP2's optional part.
ACTIVITY_LABELS: dict[str, dict[str, str]] = {
    "motionsense": {
        "dws": "downstairs",
        "ups": "upstairs",
        "sit": "sit",
        "std": "stand",
        "wlk": "walk",
        "jog": "run",
    },
    "uci_hapt": _UCI,
    "uci_har": _UCI,
    "dsa": {
        "a01": "sit",
        "a02": "stand",
        "a03": "lie",
        "a04": "lie",
        "a05": "upstairs",
        "a06": "downstairs",
        "a09": "walk",
        "a10": "walk",
        "a11": "walk",
        "a12": "run",
        "a13": "stepper",
        "a14": "cross_trainer",
        "a15": "cycle",
        "a16": "cycle",
        "a17": "row",
        "a18": "jump",
        "a19": "basketball",
    },
    "hhar": {
        "bike": "cycle",
        "sit": "sit",
        "stand": "stand",
        "walk": "walk",
        "stairsup": "upstairs",
        "stairsdown": "downstairs",
    },
    "realworld": {
        "climbingdown": "downstairs",
        "climbingup": "upstairs",
        "jumping": "jump",
        "lying": "lie",
        "running": "run",
        "sitting": "sit",
        "standing": "stand",
        "walking": "walk",
    },
    "pamap2": {
        "lying": "lie",
        "sitting": "sit",
        "standing": "stand",
        "walking": "walk",
        "running": "run",
        "cycling": "cycle",
        "Nordic walking": "nordic_walk",
        "ascending stairs": "upstairs",
        "descending stairs": "downstairs",
        "vacuum cleaning": "vacuum",
        "ironing": "iron",
        "rope jumping": "rope_jump",
    },
}
