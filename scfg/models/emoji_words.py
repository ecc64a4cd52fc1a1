"""The words of scenes of emoji, for those who need the words alone: free of torch."""

NOUNS = {  # and the code point of each
    "dog": "1f436", "cat": "1f431", "lion": "1f981", "fox": "1f98a", "panda": "1f43c",
    "rabbit": "1f430", "pig": "1f437", "frog": "1f438", "chicken": "1f414", "penguin": "1f427",
    "owl": "1f989", "duck": "1f986", "bee": "1f41d", "ladybug": "1f41e", "butterfly": "1f98b",
    "snail": "1f40c", "turtle": "1f422", "octopus": "1f419", "crab": "1f980", "fish": "1f420",
    "whale": "1f433", "elephant": "1f418", "cactus": "1f335", "mushroom": "1f344",
    "sunflower": "1f33b", "rose": "1f339", "apple": "1f34e", "banana": "1f34c", "pear": "1f350",
    "watermelon": "1f349", "lemon": "1f34b", "strawberry": "1f353", "carrot": "1f955",
    "pizza": "1f355", "burger": "1f354", "donut": "1f369", "cake": "1f370", "guitar": "1f3b8",
    "drum": "1f941", "trumpet": "1f3ba", "clock": "23f0", "umbrella": "2602-fe0f",
    "balloon": "1f388", "gift": "1f381", "crown": "1f451", "key": "1f511", "rocket": "1f680",
    "car": "1f697", "airplane": "2708-fe0f", "house": "1f3e0", "star": "2b50", "heart": "2764-fe0f",
    "snowman": "26c4", "football": "26bd", "robot": "1f916", "ghost": "1f47b",
}  # fmt: skip
COLOURS = {
    "red": (0.86, 0.20, 0.20), "orange": (0.95, 0.55, 0.15), "yellow": (0.96, 0.84, 0.25),
    "green": (0.22, 0.66, 0.32), "blue": (0.22, 0.42, 0.88), "purple": (0.58, 0.30, 0.78),
    "pink": (0.96, 0.60, 0.76), "gray": (0.55, 0.57, 0.60),
}  # fmt: skip
TINTS = ("red", "green", "blue", "purple")
SIZES = ("small", "large")
ATTRIBUTES = (*TINTS, *SIZES)
TEXTURES = ("plain", "striped", "checkered")
WORDS = ("a", "an", "and", "on", "background", *NOUNS, *COLOURS, *SIZES, *TEXTURES[1:])
