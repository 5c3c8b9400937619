import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vesl.transforms.captions import MAX_CHARS, CaptionRule, Examined, clean, examine, speaks, visible


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  a \t red\n\nball ", "a red ball"),
        ("<b>a red</b> ball<br/>on <a href='x'>it</a><!-- hidden -->", "a red ball on it"),
        ("salt &amp; pepper&nbsp;mill &#39;old&#39;", "salt & pepper mill 'old'"),
        ("2 < 3 > 1 and <3", "2 < 3 > 1 and <3"),
        ("a\x00b\x1b[31m\x7f\u2028c", "a b [31m c"),
        ("half \ud83d pair", "half pair"),
        ("cafe\u0301", "café"),
        ("👩\u200d👩\u200d👧 family", "👩\u200d👩\u200d👧 family"),
        ("<script>alert(1)</script>", "alert(1)"),
        ("", ""),
        ("a \ue000 b \uffff c \u0378 d", "a b c d"),  # private use, no characters
        ("ﬁne ① ½ Å", "ﬁne ① ½ Å"),  # composed, not replaced by look-alikes
        ("1 &lt; 2", "1 < 2"),
        ("press &lt;b&gt; for bold", "press <b> for bold"),  # what is escaped is text and no tag
        ("x" * (MAX_CHARS - 1) + " y", "x" * (MAX_CHARS - 1)),
    ],
)
def test_clean(text: str, plain: str) -> None:
    assert clean(text) == plain


def test_length_is_bounded() -> None:
    assert len(clean("word " * 100_000)) <= MAX_CHARS
    assert len(clean("<" * 1_000_000)) <= MAX_CHARS


@given(st.text(alphabet=st.characters()))
def test_any_text_becomes_one_valid_line(text: str) -> None:
    once = clean(text)
    assert once == once.strip()
    assert "\n" not in once
    once.encode()
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in once)


def test_visible() -> None:
    assert (
        visible("a \x1b]0;owned\x07\x1b[2J b\u202e\n漢字 😀") == "a \ufffd]0;owned\ufffd\ufffd[2J b\ufffd\ufffd漢字 😀"
    )


RULE = CaptionRule()
PROMPT = "Describe this image in one detailed paragraph."
LONG = (
    "A red double-decker bus drives past a row of brick houses. People walk along the pavement with shopping bags and "
    "umbrellas as light rain falls. In the background, a church tower rises above the trees, and the clock on the "
    "tower shows half past three. A man in a grey coat waits next to a man in a blue coat and a woman in a red coat."
)


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        "A dog",
        "x",
        "一只猫坐在桌子上",
        "A sign that says no, no, no",
        "no no no no no no no no",  # a wall of graffiti
        "A street with row after row after row after row of houses.",
        'A poster on which "love love love love love love love love love love love love love" is printed.',
        "Goooooooooal is written on the scoreboard.",
        "A man, a woman, a man, a woman, a man and a woman stand in line.",
        "A phone number, 5 5 5 5 5 5 5 5 5 5, on a billboard",
        '"I\'m sorry" is written on a T-shirt worn by a man.',
        "“I’m sorry, but I can’t assist you with that”, says the robot of a comic.",
        "I'm sorry I'm late, says the card.",
        "I'm sorry, I can't adult today, says a mug.",
        "I can't help falling in love with you, reads a mug.",
        "I can see a dog.",
        "Sorry, we're closed, says a sign on the door.",
        "Unfortunately, the cake fell to the floor.",
        "As an artist, I paint.",
        "It looks like the image isn't a photograph but a painting.",
        "There is no image of a dog on the wall, only an empty frame.",
        "A man stands at a podium. I cannot identify him.",
        "A screen on which an AI says: I cannot assist with that.",
        "Lo siento, estamos cerrados, dice el cartel de la puerta.",
        "No puedo vivir sin café está escrito en una taza.",
        "No puedo ver el mañana, dice un grafiti.",
        "No se ve ninguna persona en la calle.",
        "Por favor, no dar de comer a los patos, dice un letrero.",
        "Como una inteligencia, el reloj domina la plaza.",
        "Désolé, nous sommes fermés, indique une pancarte.",
        "Je ne peux pas vivre sans toi, est-il écrit sur un mur.",
        "Aucune image n'est accrochée au mur.",
        "Malheureusement, le gâteau est tombé par terre.",
        "Es tut mir leid, wir haben geschlossen, steht auf dem Schild.",
        "Ich kann nicht mehr, steht auf einem T-Shirt.",
        "Ich kann dich nicht sehen, steht auf einer Wand.",
        "Auf dem Bild ist kein Mensch zu sehen.",
        "Ich kann das Foto an der Wand sehen, steht auf der Tafel.",
        "Leider regnet es, und die Straße kann keiner sehen.",
        "Desculpe o transtorno, estamos em obras, diz a placa.",
        "Não posso viver sem café, diz a caneca.",
        "Infelizmente, o bolo caiu no chão.",
        "Por favor, não pise na grama, diz a placa.",
        "Извините, закрыто, написано на табличке.",
        "Я не могу без тебя, написано на стене.",
        "К сожалению, лица человека не видно.",
        "На фото изображён кот, который не может выйти.",
        "无法看清人物的面部，背景是一片森林。",
        "对不起，本店今日休息，牌子上写着。",
        "我不能没有你，墙上写着。",
        "请勿触摸展品，牌子上写着。",
        "没有人的街道上停着一辆红色的车。",
        "申し訳ありませんが、本日は休業です、と看板に書かれている。",
        "この画像では人物の顔は確認できません。",
        "写真には赤いバスが写っている。",
        "すみません、通ります、と書かれた看板。",
    ],
)
def test_a_caption_is_left_as_it_is(text: str) -> None:
    assert examine(text, RULE, prompt=PROMPT) == Examined(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, I cannot identify people in images.",
        "I'm sorry. I can't help with identifying people.",
        "Sorry, I can't do that.",
        "I apologize, but I cannot provide a description of this image.",
        "I am unable to view images.",
        "I won't be able to help with that.",
        "I'm currently unable to view images.",
        "As an AI language model, I cannot see.",
        "Unfortunately, I am not able to see the image.",
        "It seems that you didn't attach an image.",
        "I don't see any image attached.",
        "There is no image provided.",
        "No image was provided.",
        "Please upload the image you would like described.",
        "Lo siento, pero no puedo ayudarte con eso.",
        "Lo siento, no puedo identificar a las personas de la imagen.",
        "No puedo ver la imagen.",
        "Desafortunadamente, no soy capaz de describir imágenes.",
        "Como modelo de lenguaje, no puedo ver imágenes.",
        "Por favor, sube la imagen que quieres que describa.",
        "Je suis désolé, mais je ne peux pas vous aider avec cette demande.",
        "Désolée, je ne suis pas en mesure de décrire cette image.",
        "Je ne peux pas voir l’image.",
        "En tant que modèle de langage, je ne peux pas voir les images.",
        "Aucune image n'a été fournie.",
        "Es tut mir leid, aber ich kann dabei nicht helfen.",
        "Es tut mir leid, ich kann die Person auf dem Bild nicht identifizieren.",
        "Leider kann ich dieses Bild nicht beschreiben.",
        "Ich kann das Bild nicht sehen.",
        "Leider kann ich Ihnen bei dieser Anfrage nicht behilflich sein.",
        "Als KI kann ich keine Bilder sehen.",
        "Es wurde kein Bild hochgeladen.",
        "Desculpe, mas não posso ajudar com isso.",
        "Desculpe, não posso te ajudar.",
        "Sinto muito, não consigo identificar pessoas em imagens.",
        "Infelizmente, não consigo visualizar a imagem.",
        "Como um modelo de linguagem, não posso ver imagens.",
        "Извините, но я не могу помочь с этим.",
        "К сожалению, не могу помочь.",
        "К сожалению, я не могу описать это изображение.",
        "Я не могу определить личность человека на изображении.",
        "Как языковая модель, я не могу видеть изображения.",
        "Пожалуйста, загрузите изображение.",
        "抱歉，我无法描述这张图片。",
        "很抱歉，我无法协助处理此请求。",
        "对不起，我不能帮助您识别图中的人物。",
        "我无法查看图片。",
        "抱歉，無法識別照片中的人物。",
        "作为一个人工智能语言模型，我无法查看图像。",
        "您似乎没有上传图片。",
        "请上传您想要描述的图片。",
        "申し訳ありませんが、この画像について説明することはできません。",
        "申し訳ございませんが、そのリクエストにはお答えできません。",
        "すみませんが、画像の人物を特定することはできません。",
        "申し訳ございません。この画像の人物についてはお答えできません。",
        "この画像を説明することはできません。",
        "私はAIなので、画像を見ることができません。",
        "画像が添付されていません。",
    ],
)
def test_a_refusal(text: str) -> None:
    assert examine(text, RULE) == Examined("", ("refusal",))
    assert examine(text, CaptionRule(refusals=False)).text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A dog runs over the lawn. The grass is green. The grass is green. The grass is green. The grass is green.",
         "A dog runs over the lawn. The grass is green."),
        (f"{LONG} A sign reads {'no way ' * 20}", LONG),
        (f"{LONG} He says {'ha' * 40}!", LONG),
        (f"{LONG} {'!' * 50}", LONG),
        (f'{LONG} It says "{"yes " * 30}', LONG),  # a mark that is not closed protects nothing
        (f"{LONG} {'Ball, ' * 20} It is {LONG}", LONG),
        ("a dog and a cat and " * 5, ""),
        ("The dog. " * 12, ""),  # too little is left
        ("图片中有一只猫" * 4, ""),
        ("hello " * 3000, ""),
        ("A dog" + "!" * 40, ""),
    ],
)  # fmt: skip
def test_a_loop_is_cut_off(text: str, kept: str) -> None:
    assert examine(text, RULE) == Examined(kept, ("loop_cut" if kept else "repetition",))
    assert examine(text, RULE, complete=False) == examine(text, RULE)
    assert examine(text, CaptionRule(loop_times=0, min_distinct=0)).text == clean(text)


def test_going_round_in_small_variations() -> None:
    places = ("left", "right", "top", "bottom", "table", "floor", "chair", "bed", "wall", "roof", "shelf", "box")
    text = " ".join(f"There is a small black cat sitting on the {place}." for place in places)
    assert examine(text, RULE) == Examined("", ("repetition",))
    assert examine(text, CaptionRule(min_distinct=0)) == Examined(text)


@pytest.mark.parametrize(
    ("text", "kept", "note"),
    [
        ("A dog runs. It is bro", "A dog runs.", "cut_at_sentence"),
        ("A dog runs.", "A dog runs.", "cut_at_sentence"),
        ('It says "stop!" A man', 'It says "stop!"', "cut_at_sentence"),
        ("Mr. Smith is at St. Louis. He met Dr. ", "Mr. Smith is at St. Louis.", "cut_at_sentence"),
        ("A U.S. flag hangs. J. R. Smith", "A U.S. flag hangs.", "cut_at_sentence"),
        ("A price of 1.50 is shown. It", "A price of 1.50 is shown.", "cut_at_sentence"),
        ("A pause... and more. Then", "A pause... and more.", "cut_at_sentence"),
        ("1. A dog runs. 2. A cat", "1. A dog runs.", "cut_at_sentence"),
        ("一只猫。一只狗在", "一只猫。", "cut_at_sentence"),
        ("a red car, in front of a buil", "a red car, in front of a", "unfinished"),
        ("a red car, (buil", "a red car", "unfinished"),
        ("buil", "buil", "unfinished"),
    ],
)
def test_what_the_token_limit_cut(text: str, kept: str, note: str) -> None:
    assert examine(text, RULE, complete=False) == Examined(kept, (note,))
    assert examine(text, RULE) == Examined(text.strip())


@pytest.mark.parametrize(
    ("prompt", "text", "kept", "notes"),
    [
        (PROMPT, f"{PROMPT} A dog runs.", "A dog runs.", ("echo_removed",)),
        (PROMPT, "describe this image in one DETAILED paragraph:\n\nA dog", "A dog", ("echo_removed",)),
        (PROMPT, f'USER: {PROMPT} ASSISTANT: "STOP" on a sign', '"STOP" on a sign', ("echo_removed",)),
        (PROMPT, f'"{PROMPT}" A dog', "A dog", ("echo_removed",)),
        (PROMPT, PROMPT, "", ("prompt_echo",)),
        (PROMPT, "Describe this image in one", "", ("prompt_echo",)),
        (PROMPT, "Describe", "Describe", ()),
        (PROMPT, "Describe this picture: a dog", "Describe this picture: a dog", ()),
        ("a photo of", "a photo of a dog", "a photo of a dog", ()),  # meant as the caption's beginning
        ("", "A dog", "A dog", ()),
        ("!?", "A dog", "A dog", ()),
    ],
)
def test_the_prompt_said_back(prompt: str, text: str, kept: str, notes: tuple[str, ...]) -> None:
    assert examine(text, RULE, prompt=prompt) == Examined(kept, notes)
    assert examine(text, CaptionRule(echoes=False), prompt=prompt) == Examined(clean(text))


@pytest.mark.parametrize("text", ["", " \n", "...", "\x00", "<b></b>", "!" * 500, "🙂", "<MORE_DETAILED_CAPTION>"])
def test_nothing_said(text: str) -> None:
    assert examine(text, RULE) == Examined("", ("empty_caption",))


def test_language() -> None:
    def german(text: str) -> tuple[str, float]:
        return "de", 0.9 if "Ball" in text else 0.3

    rule = CaptionRule(language="en")
    text = "Ein roter Ball liegt auf dem Tisch."
    assert examine(text, rule, language_of=german) == Examined("", ("wrong_language",))
    assert examine(text, RULE, language_of=german) == examine(text, rule) == Examined(text)
    assert examine(text, CaptionRule(language="de"), language_of=german) == Examined(text)
    assert examine("A red bell stands upon a table.", rule, language_of=german).text  # not sure enough
    assert speaks("Ball, rot", rule, german)  # too short to tell


@pytest.mark.parametrize(
    "options",
    [{"loop_times": 1}, {"loop_words": -1}, {"min_distinct": 1.1}, {"language": "English"}, {"language_sure": -0.1}],
)
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        CaptionRule(**options)  # type: ignore[arg-type]


HOSTILE = {
    "dots": "." * 20_000 + "a", "closed": 'a."' * 7000, "quotes": "\"' " * 7000 + "a", "open": "“no " * 5000,
    "single": "'a " * 7000, "names": "Mr. X " * 4000, "initials": "a. " * 7000, "sorry": "I'm sorry " * 2000,
    "numbers": " ".join(str(i * i % 9973) for i in range(5000)), "han": "猫狗" * 9000, "bang": "!a" * 9000,
    "almost": ("ab" * 19 + "c") * 500, "alike": "it seems there is no " * 1000, "nul": "\x00" * 20_000 + "a",
    "tags": "<a " * 9000, "marks": "e" + "\u0301" * 20_000, "spaces": "a , " * 5000,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_takes_no_long_time(name: str) -> None:
    text = HOSTILE[name]
    start = time.process_time()
    for complete in (True, False):
        for prompt in ("", text, PROMPT):
            examine(text, RULE, prompt=prompt, complete=complete)
    assert time.process_time() - start < 1.5


@given(st.text(alphabet=st.sampled_from("ab .!,'\"“”\n猫I'm sorry"), max_size=300), st.booleans())
def test_what_is_kept_stands_in_the_text(text: str, complete: bool) -> None:
    found = examine(text, RULE, complete=complete)
    assert found.text in clean(text)
    assert found.text or len(found.notes) == 1
