"""256 short English words to read a fingerprint over the phone: none is another's beginning, few sound alike."""

from __future__ import annotations

WORDS: tuple[str, ...] = tuple(
    """
    acorn actor adult agent album alarm amber angle anchor apple april apron arena armor arrow atlas
    attic autumn bacon badge bagel baker bamboo banjo barrel basket beach beaver bell bonfire berry bicycle
    bishop blanket blue bottle bowl branch bread bridge bronze bubble bucket butter cabin cactus camel candle
    canoe carpet castle cedar cello chalk cherry chess chimney circus clay clinic clock cloud coffee comet
    copper coral cotton cousin cowboy crane cricket crown curtain daisy dancer desert diamond dinner doctor dolphin
    dollar dragon drum eagle earth echo elbow elephant engine falcon family farmer feather fence fabric fiddle
    finger flag flute forest fossil fox frog garden garlic giant giraffe glove goat gold grape guitar
    hammer harbor hazel hedge helmet hockey honey hotel igloo inch ink iron island ivory jacket jaguar
    jelly jewel jungle kettle kitchen kite koala ladder lake lamp lantern lemon library lion lily lobster
    magnet mango maple marble market meadow melon mirror monkey moon motor mountain museum mustard napkin needle
    nephew nickel north novel nurse oak oasis ocean olive onion orange orbit orchid otter oven ostrich
    oyster pagoda palace panda paper parrot peanut pencil penguin pepper piano pillow pilot planet pocket poem
    potato prince puzzle quartz queen rabbit radio rainbow ribbon river robin rope ruby saddle salad salmon
    sandal school scissors shadow shovel silver silk sister snow sofa soldier spider spoon square squirrel stamp
    statue storm sugar summer table tailor teacher temple thumb tiger tomato tower tractor trumpet tulip tunnel
    turtle uncle valley velvet village violin volcano wagon walnut whale window winter wizard yellow zebra zipper
    """.split()  # noqa: SIM905
)
