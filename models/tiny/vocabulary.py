"""The words of the tiny models: what ImageNet's and DeepLab's classes are called, and which kinds they belong to."""

import re

# The kinds of ImageNet's classes ("words: class numbers"), for phrases and captions that name no finer one.
KINDS = """
animal: 0-397; fish: 0-6 389-397; shark: 2-4; bird: 7-24 80-100 127-146; owl: 24; eagle: 22; duck: 97 98; swan: 100;
parrot: 87-90; penguin: 145; frog: 30-32; turtle: 33-37; lizard: 38-48; crocodile: 49 50; dinosaur: 51; snake: 52-68;
spider: 70 72-77; salamander: 25-29; crab: 118-121 125; lobster: 122-124; whale: 147 148; seal: 149 150; dog/puppy:
151-268; wolf: 269-271; fox: 277-280; cat/kitten: 281-285; big cat: 286-293; bear: 294-297; insect: 300-326; beetle:
300-307; butterfly: 321-326; rabbit: 330-332; rodent: 333-338; mouse/rat: 333; squirrel: 335; horse: 339; zebra: 340;
pig: 341-343; cow/cattle: 345-347; sheep: 348; goat: 349 350; antelope/deer: 351-353; camel: 354; monkey: 369-382;
ape: 365-368; elephant: 101 385 386; panda: 387 388; marsupial/kangaroo: 104-106; marsupial: 104-106; building: 410
415 424 425 442 448 449 454 467 483 497 498 500 538 580 634 660 663 668 672 698 727 743 762 788 832 860 865 915;
temple: 442 483 497 538 663 668 698 832; pagoda: 442 663 698 832; tower: 442 497 538 900 682 863; house: 425 449 660
915; church: 406 442 497 538 663; castle: 483 698; roof: 853 858 538; bridge: 821 839 888; fence: 489 716 912; wall:
825; boat/ship: 403 449 472 484 510 536 554 576 625 628 724 780 814 833 871 914 913; airplane: 404 895 405; vehicle:
407 408 436 444 466 468 511 547 554 555 565 569 573 575 586 609 612 627 654 656 661 665 670 671 675 705 717 734 751
757 779 802 803 817 820 829 847 864 866 867 870 874 880; car: 407 436 468 511 609 627 656 661 717 734 751 817; truck:
555 569 675 717 864 867; bus: 654 779 874; van: 654 656 675 734; motorcycle: 665 670; bicycle: 444 671 870 880; train:
466 547 565 705 820 829; wheel/tire: 479 535; rocket: 657 744 812; helmet: 518 560 715; hat/cap: 439 452 515 518 560
667 808 433 793; shoe: 502 514 630 770 774; glasses: 836 837; clothes: 399 400 411 445 459 474 501 568 578 608 610 614
617 638 639 652 655 689 697 735 775 834 841 842 869; uniform: 652 834; jacket/coat: 474 568 617 834 841 869; dress:
578 601 614 689; shirt: 610 841; tie: 451 457 906; ball: 429 430 522 574 722 768 805 852 890; drum: 541 822; guitar:
402 420 546; piano: 579 881; musical instrument: 401 402 420 432 486 513 541 546 558 566 577 579 593 594 641 642 683
684 687 699 776 822 875 881 889; cup/mug: 504 647 967 968; coffee: 504 505 550 967; drink: 441 969 966 967; glass: 441
572 966; bottle: 440 720 737 898 907 901; bowl: 659 809 738; pot: 469 505 521 544 738 849; plate/saucer: 923; spoon:
618 910 813; knife: 499 623; pan: 567 909; bag: 414 636 728 748 790; box: 478 492 519; basket: 588 790; chair: 423 559
703 765 857; bench: 703; sofa: 831; bed: 516 520 564; table: 526 532 736; lamp/light: 606 619 818 846 862;
clock/watch: 409 530 531 604 826 892; camera: 732 759; phone/telephone: 487 528 707; computer: 527 590 620; keyboard:
508 878; screen: 664 782 851; tv: 851; gun: 413 763 764; tool: 473 477 491 587 596 740 784 792; food: 924-938 957
959-965; fruit: 948-957; apple: 948; vegetable: 936-946; bread: 930-932; flower: 985 986 984; mushroom: 947 991-997;
mountain: 970 980; water/lake: 449 975 977 978 973; beach/sea: 977 978; cliff: 972 976; stage: 819; bride/groom/man:
982; player: 981; diver: 983
"""
# Class names that say little, or something else, out of their list.
RENAMED = """
7 rooster; 15 robin bird; 17 jay bird; 21 kite bird; 97 duck; 99 goose; 129 spoonbill bird; 134 crane bird; 281 tabby
cat; 321 admiral butterfly; 322 ringlet butterfly; 323 monarch butterfly; 332 Angora rabbit; 339 brown horse; 348 ram
sheep; 412 trash can; 436 station wagon; 456 archery bow; 468 taxi cab; 487 mobile phone; 492 wooden chest; 517
construction crane; 553 filing cabinet; 605 music player; 608 pair of jeans; 630 loafer shoe; 673 computer mouse; 677
metal nail; 680 baby bottle nipple; 714 guitar pick; 726 carpenter's plane; 744 projectile missile; 751 race car; 769
ruler; 771 safe box; 782 computer screen; 800 slot machine; 836 pair of sunglasses; 837 pair of sunglasses; 844 light
switch; 861 toilet; 881 upright piano; 882 vacuum cleaner; 884 vaulted ceiling; 908 airplane wing; 948 green apple;
967 cup of espresso; 970 mountain; 988 acorn nut; 989 rose hip; 998 ear of corn
"""
# DeepLab's classes by other words; then what follows from DeepLab alone: an animal of any kind, a person's parts.
THINGS = {
    "aeroplane": "airplane", "bicycle": "bike", "bird": "", "boat": "ship", "bottle": "",
    "bus": "vehicle", "car": "vehicle", "cat": "kitten", "chair": "", "cow": "cattle",
    "dining table": "table", "dog": "puppy", "horse": "",
    "motorbike": "motorcycle",
    "person": "man/woman/men/women/child/children/people/girl/boy/baby/kid/lady/guy/human/crowd/couple/"
    "player/athlete/worker/soldier/officer/astronaut/photographer/singer/dancer/driver/rider/student/chef/tourist",
    "potted plant": "plant/flower", "sheep": "lamb", "sofa": "couch", "train": "vehicle",
    "tv": "television/screen/monitor",
    "animal": "", "face": "head/hair", "clothes": "suit/uniform/coat/jacket/dress/shirt/sweater/costume/outfit",
}  # fmt: skip
CLASSES = 1000 + len(THINGS)
PERSON, ANIMAL, FACE = 14, 20, 21  # positions among the things; clothes follow the face
ANIMALS = [2, 7, 9, 11, 12, 16]
UNSURE = [10, PERSON, 15]  # tables, persons, plants: ImageNet hardly knows them and cannot contradict DeepLab

SKIPPED = re.compile(
    r"\b(an?|the|th(is|at|ese|ose)|his|her|its|their|our|my|your|some|several|many|few"
    r"|one|two|three|four|five|six|seven|eight|nine|ten)\b(?!['-])"
)
AFTER_HEAD = re.compile(
    r" (of|in|on|with|at|next|near|by|under|over|behind|from|to|and|beside|above|below|between|wearing|holding) "
)


def plain(phrase: str) -> tuple[str, str]:
    """A phrase without articles and numbers, and its head noun; ("", "") where there is no Latin letter."""
    words = re.findall(r"[a-z][a-z'-]*", SKIPPED.sub(" ", phrase[:300].lower()))[:24]
    head = AFTER_HEAD.split(" ".join(words) + " ")[0].split()
    return " ".join(words), head[-1] if head else ""
