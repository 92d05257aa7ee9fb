"""Pages in scripts without spaces between words: good ones are kept, bad ones dropped for the right reason."""

# ruff: noqa: RUF001 -- punctuation of other scripts looks like ours

from __future__ import annotations

import json
import re

import pytest

TEXTS = {
    "zh": (
        "冬天的港口醒得很慢，住在这里的渔民不到天亮不会上船。\n"
        "老灯塔是什么时候修的，谁也说不清楚，只知道看塔人领的是粮食和蜡烛。\n"
        "夏天游客来的时候，小店才有足够的收入过完后面安静的几个月。\n"
        "祖母常说，大海想要什么就拿走什么，房子要盖在风抓不住的地方。\n"
        "沿着悬崖有一条小路通到邻村，傍晚走在上面可以看到整个海湾。\n"
        "年轻人一个个去了城里，学校里的孩子一年比一年少。\n"
        "镇上决定春天开始修理被风暴打坏的码头，只要钱能凑齐。\n"
        "码头旁边的面包房每天最早开门，买面包的人都互相认识。\n"
        "去年冬天雪下得很大，从山上下来的路有三天走不通。\n"
        "每当雾气升起的时候，人们就会敲响教堂的钟给船指路。\n"
    ),
    "ja": (
        "港町は冬になるとゆっくりと目を覚まし、生涯をここで過ごしてきた漁師たちは、光が水面に差すまで船へ急ぐことはありません。\n"
        "古い灯台がいつ建てられたのか、確かなことは誰にも言えませんが、教区の記録には大麦と蝋燭で給料をもらっていた灯台守のことが書かれています。\n"
        "港の学校には毎年子どもが減り、若い人たちは町へ出て行きますが、春になると桟橋の修理が始まると議会は決めました。\n"
        "祖母は海は欲しいものを持っていくと言い、家は風がつかめないところに建てるものだと教えてくれました。\n"
        "崖に沿って次の村へ続く道があり、夕方に歩く人は湾を独り占めにできます。\n"
    ),
    "th": (
        "ท่าเรือตื่นขึ้นช้าๆ ในฤดูหนาว และชาวประมงที่อยู่ที่นั่นมาทั้งชีวิตไม่รีบลงเรือ\n"
        "ไม่มีใครบอกได้ว่าประภาคารเก่าสร้างขึ้นเมื่อใด รู้เพียงว่าคนเฝ้าได้ค่าจ้างเป็นข้าวและเทียน\n"
        "เมื่อถึงฤดูร้อนนักท่องเที่ยวก็มาพร้อมกับเสียงและเงินที่ร้านค้าต้องใช้ตลอดปี\n"
        "มีทางเดินเลียบหน้าผาไปยังหมู่บ้านถัดไป ใครที่เดินตอนเย็นจะได้เห็นอ่าวทั้งหมด\n"
    ),
    "ko": (
        "항구 마을은 겨울에 천천히 깨어나고 평생 그곳에 산 어부들은 해가 뜨기 전에는 배로 서두르지 않는다.\n"
        "오래된 등대가 언제 세워졌는지 아무도 모르지만 기록에는 보리와 양초로 품삯을 받은 등대지기가 나온다.\n"
        "여름에 손님이 오면 가게들은 긴 겨울을 날 돈을 벌고 거리는 웃음소리로 가득 찬다.\n"
        "할머니는 바다가 원하는 것을 가져간다고, 집은 바람이 잡을 것 없는 곳에 지어야 한다고 말했다.\n"
        "절벽을 따라 다음 마을로 가는 길이 있고 저녁에 그 길을 걷는 이는 만 전체를 본다.\n"
        "젊은이들은 도시로 떠나고 학교에는 해마다 아이가 줄어들지만 봄에는 부두를 고칠 것이다.\n"
    ),
}


def reasons(llmkit, path, texts: list[str]) -> list[str | None]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    rejects = path.with_name("rejects.jsonl")
    asked = ("--language", "all", "--skip", "exact_duplicates,near_duplicates", "--rejects", rejects)
    done = llmkit("crawl-filter", path, *asked, "-o", path.with_name("o"))
    assert done.returncode == 0, done.stderr
    found = {row["offset"]: row["reason"] for row in map(json.loads, rejects.read_text("utf-8").splitlines())}
    return [found.get(line) for line in range(1, len(texts) + 1)]


@pytest.mark.parametrize("language", TEXTS)
def test_good_pages_stay_and_bad_ones_go(language, llmkit, tmp_path):
    text = TEXTS[language]
    first = text.split("\n")[0]
    found = reasons(
        llmkit, tmp_path / "in.jsonl", [text, text.replace("\n", "\n\n"), first, (first + "\n") * 6, first * 6]
    )
    assert found[:2] == [None, None]
    assert all(found[2:])
    assert found[3] == "max_duplicate_line_fraction"


def test_a_chinese_page_is_checked_by_the_applicable_rules(llmkit, tmp_path):
    text = TEXTS["zh"]
    fifty = text[:60]  # about 25 words
    menu = "\n".join(line[:6] for line in text.split("\n")) + "\n" + text.replace("。", "").replace("，", "\n")
    found = reasons(llmkit, tmp_path / "in.jsonl", [fifty, menu, re.sub("(..)", r"\1 1 ", text)])
    assert found == ["min_words", "min_terminal_line_fraction", "min_alphabetic_word_fraction"]
