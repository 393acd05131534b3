"""The words of the starter corpus, and how people type them: data only. grammar.py inflects them
and puts them into the frames.

Tables are rows of cells separated by spaces; `_` in a cell is a space, `-` an empty cell. A
Devanagari word stands beside the way people type it in Latin letters, so that every sentence exists
in both scripts.
"""

# ---------------------------------------------------------------------------------------------------------------- people
# key (its last letter is the person), direct, genitive, and with ने को से पर
PRONOUNS = """
I1   मैं  मेरा      मैंने     मुझे    मुझसे   मुझ_पर
wep  हम  हमारा    हमने    हमें    हमसे    हम_पर
you2 तुम तुम्हारा   तुमने   तुम्हें   तुमसे   तुम_पर
youp आप आपका    आपने   आपको  आपसे   आप_पर
he3  वह  उसका     उसने    उसे    उससे    उस_पर
hep  वे   उनका     उन्होंने  उन्हें    उनसे    उन_पर
"""

# direct, typed, oblique (- is the same), class, pronoun
PEOPLE = {
    "name": """
राहुल rahul - m3 he3   अमित amit - m3 he3     मोहन mohan - m3 he3   रवि ravi - m3 he3     अर्जुन arjun - m3 he3
सोनू sonu - m3 he3     विकास vikas - m3 he3   करण karan - m3 he3    समीर sameer - m3 he3  इमरान imran - m3 he3
प्रिया priya - f3 he3   नेहा neha - f3 he3      अंजलि anjali - f3 he3   पूजा pooja - f3 he3    मीना meena - f3 he3
दीपक deepak - m3 he3   सुनील sunil - m3 he3    अनिल anil - m3 he3    राजेश rajesh - m3 he3   हरि hari - m3 he3
सुनीता sunita - f3 he3  ममता mamta - f3 he3   लता lata - f3 he3     रेखा rekha - f3 he3    शबाना shabana - f3 he3
काव्या kavya - f3 he3  आयशा ayesha - f3 he3   गीता geeta - f3 he3     रिया riya - f3 he3    सलमा salma - f3 he3
""",
    "kin": """
मेरा_भाई mera_bhai मेरे_भाई m3 he3                   मेरी_बहन meri_behan - f3 he3
मेरा_छोटा_भाई mera_chhota_bhai मेरे_छोटे_भाई m3 he3     मेरी_छोटी_बहन meri_chhoti_behan - f3 he3
मेरा_दोस्त mera_dost मेरे_दोस्त m3 he3                 मेरी_सहेली meri_saheli - f3 he3
""",
    "elder": """
पिताजी pitaji - mp hep   माँ maa - fp hep   दादाजी dadaji - mp hep   दादी dadi - fp hep   नानी nani - fp hep
चाचाजी chachaji - mp hep   शर्मा_जी sharma_ji - mp hep
""",
}

# ----------------------------------------------------------------------------------------------------------------- nouns
NOUNS = {                                       # word, typed, gender
    "fruit": "आम aam m  सेब seb m  केला kela m  संतरा santra m  अमरूद amrood m  अनार anaar m",
    "veg": "आलू aalu m  टमाटर tamatar m  गाजर gaajar f  बैंगन baingan m  मूली mooli f",
    "food": """समोसा samosa m  पराठा paratha m  लड्डू laddu m  पकौड़ा pakoda m  कचौड़ी kachori f  जलेबी jalebi f
    इडली idli f""",
    "dish": """खिचड़ी khichdi f  दाल daal f  पुलाव pulao m  खीर kheer f  हलवा halwa m  बिरयानी biryani f
    राजमा rajma m  कढ़ी kadhi f""",
    "drink": "चाय chai f  कॉफ़ी coffee f  दूध doodh m  लस्सी lassi f  शरबत sharbat m  जूस juice m",
    "wear_m": "कमीज़ kameez f  कुर्ता kurta m  स्वेटर sweater m  टोपी topi f",
    "wear_f": "साड़ी saree f  कुर्ता kurta m  दुपट्टा dupatta m  स्वेटर sweater m",
    "thing": """किताब kitaab f  साइकिल cycle f  घड़ी ghadi f  छाता chhata m  खिलौना khilona m  बैग bag m  गेंद gend f
    गुड़िया gudiya f""",
    "lost": "चाबी chaabi f  घड़ी ghadi f  छाता chhata m  फ़ोन phone m  किताब kitaab f  चश्मा chashma m  बैग bag m",
    "subject": "गणित ganit m  विज्ञान vigyan m  हिंदी hindi f  अंग्रेज़ी angrezi f  इतिहास itihas m  भूगोल bhugol m",
    "place": """बाज़ार bazaar m  पार्क park m  मंदिर mandir m  मेला mela m  गाँव gaon m  पुस्तकालय pustakalay m
    मैदान maidan m""",
    "city": """दिल्ली dilli m  मुंबई mumbai m  जयपुर jaipur m  लखनऊ lucknow m  नागपुर nagpur m  भोपाल bhopal m
    वाराणसी varanasi m  पुणे pune m  इंदौर indore m  चंडीगढ़ chandigarh m  हैदराबाद hyderabad m  अमृतसर amritsar m""",
    "hotcity": "दिल्ली dilli m  जयपुर jaipur m  लखनऊ lucknow m  भोपाल bhopal m  नागपुर nagpur m  वाराणसी varanasi m",
    "coldcity": "दिल्ली dilli m  लखनऊ lucknow m  चंडीगढ़ chandigarh m  अमृतसर amritsar m  श्रीनगर srinagar m",
    "pet": "कुत्ता kutta m  बिल्ली billi f  तोता tota m  गाय gaay f  खरगोश khargosh m",
    "big": "शेर sher m  हाथी haathi m  भालू bhalu m  घोड़ा ghoda m  हिरण hiran m  ऊँट oont m",
    "small": "चूहा chooha m  खरगोश khargosh m  चिड़िया chidiya f  गिलहरी gilahri f  कबूतर kabootar m  तोता tota m",
    "flower": "गुलाब gulab m  कमल kamal m  सूरजमुखी surajmukhi m",
    "role_m": "किसान kisan m  लड़का ladka m  लकड़हारा lakadhara m  कुम्हार kumhar m  दुकानदार dukandar m",
    "role_f": "लड़की ladki f  औरत aurat f  मालिन malin f",
    "plain": """# only written  out in frames  घर ghar m  कमरा kamra m  आँगन aangan m  बरामदा baramda m  छत chhat f
    दरवाज़ा darwaza m  खिड़की khidki f  गली gali f  सड़क sadak f  मेज़ mez f  बिस्तर bistar m  बगीचा bagicha m
    मैदान maidan m  खेत khet m  जंगल jungle m  नदी nadi f  पहाड़ pahaad m  कुआँ kuan m  गड्ढा gaddha m  जाल jaal m
    जगह jagah f  रास्ता raasta m  शहर shahar m  स्कूल school m  कॉलेज college m  ऑफ़िस office m  बैंक bank m
    अस्पताल hospital m  स्टेशन station m  दुकान dukaan f  किला kila m  झूला jhoola m  टीम team f  मैच match m  मीटिंग meeting f
    पार्टी party f  कंप्यूटर computer m  प्लान plan m  बादल baadal m  बारिश baarish f  धूप dhoop f  हवा hawa f
    कोहरा kohra m  मिठाई mithai f  सब्ज़ी sabzi f  नाश्ता nashta m  दाना daana m  फल phal m  फसल fasal f  बीज beej m
    पेड़ ped m  पौधा paudha m  फूल phool m  जानवर jaanwar m  पानी paani m  रोटी roti f  टुकड़ा tukda m  चम्मच chammach f
    सिक्का sikka m  थैला thaila m  तस्वीर tasveer f  कपड़ा kapda m  बर्तन bartan m  दोस्त dost m  सहेली saheli f
    भाई bhai m  बहन behan f  मेहमान mehmaan m  पड़ोसी padosi m  रिश्तेदार rishtedar m  लोग log m  आदमी aadmi m
    बूढ़ा boodha m  शिकारी shikari m  चोर chor m  मालिक maalik m  ग्राहक grahak m  मरीज़ mareez m  अध्यापक adhyapak m
    परिवार parivaar m  हाथ haath m  पैसा paisa m  घंटा ghanta m  महीना mahina m  हफ़्ता hafta m  साल saal m  दिन din m
    रात raat f  शाम shaam f  सुबह subah f  दोपहर dopahar f  छुट्टी chhutti f  परीक्षा pariksha f  बात baat f
    गलती galti f  चीज़ cheez f  नौकरी naukri f  गाड़ी gaadi f  कहानी kahani f  किताब kitaab f  फ़िल्म film f
    ख़बर khabar f  चिट्ठी chitthi f  डायरी diary f  कविता kavita f  यात्रा yaatra f  दीया deeya m  खज़ाना khazana m
    इनाम inaam m  पता pata m  सवाल sawaal m  आवाज़ awaaz f  पीठ peeth f  पेट pet m  खाट khaat f  दवा dawa f
    डॉक्टर doctor m  मिनट minute m""",
    "kid_m": "लड़का ladka m  बच्चा bachcha m",
    "kid_f": "लड़की ladki f  बच्ची bachchi f",
    "child_m": "बेटा beta m",
    "child_f": "बेटी beti f",
    "job": "डॉक्टर doctor m  इंजीनियर engineer m  वकील vakeel m  पुलिस_अफ़सर police_afsar m  लेखक lekhak m",
    "festival": "दीवाली deewali f  होली holi f  ईद eid f  लोहड़ी lohri f",
    "game": "क्रिकेट cricket m  फ़ुटबॉल football m  कबड्डी kabaddi f  हॉकी hockey f  बैडमिंटन badminton m",
    "day": """सोमवार somvar m  मंगलवार mangalvar m  बुधवार budhvar m  गुरुवार guruvar m  शुक्रवार shukravar m
    रविवार ravivar m""",
    "ride": "बस bus f  ट्रेन train f  कार car f",
    "cab": "बस bus f  ऑटो auto m  रिक्शा riksha m",
    "skill": """तैरना tairna m  नाचना naachna m  गाना gana m  साइकिल_चलाना cycle_chalana m
    खाना_बनाना khana_banana m  चित्र_बनाना chitra_banana m  गिटार_बजाना guitar_bajana m
    कविता_लिखना kavita_likhna m""",
}

ADJECTIVES = {                                  # masculine singular; the typed form is in WORDS
    "color": "लाल नीला पीला हरा सफ़ेद काला गुलाबी",
    "fresh": "ताज़ा मीठा सस्ता अच्छा बढ़िया",
}

NUMBERS = {                                     # low, high, step
    "price": (70, 120, 10), "low": (45, 60, 5), "cost": (200, 1200, 50), "num": (2, 9, 1), "few": (2, 5, 1),
    "heat": (38, 46, 1), "cool": (3, 12, 1), "mild": (20, 28, 1), "wet": (20, 26, 1), "am": (5, 8, 1), "eve": (4, 7, 1),
    "night": (9, 11, 1), "marks": (60, 98, 1), "min": (5, 40, 5), "cook": (15, 30, 5), "grade": (3, 10, 1), "hours": (3, 12, 1),
}

# ----------------------------------------------------------------------------------------------------------------- verbs
VERBS = """
खेल khel  खा kha  पी pi  पढ़ padh  लिख likh  देख dekh  सुन sun  गा ga  बना bana  धो dho  कर kar  दे de  ले le  चला chala
दौड़ daud  टहल tahal  तैर tair  सो so  नहा naha  नाच naach  जा ja  आ aa  मिल mil  सीख seekh  खरीद khareed  ला la
बैठ baith  उठ uth  लौट laut  पहुँच pahunch  पूछ poochh  बोल bol  सोच soch  रख rakh  रो ro  हँस hans  गिर gir  चल chal
घूम ghoom  रुक ruk  लग lag  निकल nikal  माँग maang  बुला bula  बता bata  समझ samajh  समझा samjha  काट kaat  पका paka
डाल daal  भून bhoon  उबाल ubaal  परोस paros  चाह chah  सक sak  रह rah  हो ho  भूल bhool  ढूँढ dhoondh  बचा bacha  कह kah
"""

IRREGULAR = """
जा ya गया gaya   कर ya किया kiya   कर iye कीजिए kijiye   हो ya हुआ hua   हो ga होगा hoga
दे ya दिया diya   दे ga देगा dega   दे imp दो do   दे iye दीजिए dijiye   ले ya लिया liya   ले ga लेगा lega   ले imp लो lo
ले iye लीजिए lijiye   पी ya पिया piya   पी ga पिएगा piyega   पी imp पियो piyo   पी iye पीजिए pijiye
"""

# m1 f1 m2 f2 m3 f3 mp fp: each form with its typed form
AUXILIARIES = """
है   हूँ hoon  हूँ hoon  हो ho  हो ho  है hai  है hai  हैं hain  हैं hain
था  था tha  थी thi  थे the  थीं thi  था tha  थी thi  थे the  थीं thi
होगा होऊँगा hounga  होऊँगी houngi  होगे hoge  होगी hogi  होगा hoga  होगी hogi  होंगे honge  होंगी hongi
"""

# object:its class (nothing: intransitive) | ...   verb   a anybody, k not elders   when   where
ACTIVITIES = """
क्रिकेट:m3|फ़ुटबॉल:m3|कबड्डी:f3|बैडमिंटन:m3        खेल   k  सुबह|शाम_को        मैदान_में|पार्क_में|दोस्तों_के_साथ
लूडो:m3|कैरम:m3|शतरंज:f3                   खेल   a  दोपहर_में|शाम_को|रात_को  घर_पर|बरामदे_में|परिवार_के_साथ
खाना:m3|दाल_रोटी:f3|खिचड़ी:f3|पराठे:mp        खा    a  दोपहर_में|रात_को     घर_पर|परिवार_के_साथ
आम:mp|केले:mp|समोसे:mp|पकौड़े:mp|जलेबियाँ:fp     खा    a  दोपहर_में|शाम_को     छत_पर|घर_पर|दोस्तों_के_साथ
चाय:f3|दूध:m3|कॉफ़ी:f3|लस्सी:f3              पी    a  सुबह|शाम_को        घर_पर|बरामदे_में|छत_पर
किताब:f3|कहानी:f3|अख़बार:m3|कविता:f3         पढ़    a  सुबह|दोपहर_में|रात_को  घर_पर|बगीचे_में|कमरे_में
चिट्ठी:f3|कहानी:f3|डायरी:f3|कविता:f3          लिख   a  सुबह|दोपहर_में|रात_को  घर_पर|कमरे_में
टीवी:m3|फ़िल्म:f3|क्रिकेट_मैच:m3|ख़बरें:fp        देख   a  दोपहर_में|शाम_को|रात_को  घर_पर|परिवार_के_साथ
गाने:mp|संगीत:m3|रेडियो:m3                   सुन   a  सुबह|शाम_को|रात_को  घर_पर|कमरे_में|छत_पर
खाना:m3|चाय:f3|रोटियाँ:fp|खिचड़ी:f3|हलवा:m3|पुलाव:m3  बना  a  सुबह|दोपहर_में|शाम_को  रसोई_में|घर_पर
कपड़े:mp|बर्तन:mp                           धो    a  सुबह|दोपहर_में       घर_पर|आँगन_में
कमरा_साफ़:m3|आँगन_साफ़:m3|रसोई_साफ़:f3          कर   a  सुबह|दोपहर_में|शाम_को  _
काम:m3|आराम:m3                             कर   a  सुबह|दोपहर_में|शाम_को  घर_पर|कमरे_में
योग:m3|व्यायाम:m3                            कर   a  सुबह|शाम_को        छत_पर|पार्क_में|बगीचे_में
पढ़ाई:f3|परीक्षा_की_तैयारी:f3|होमवर्क:m3         कर   k  सुबह|शाम_को|रात_को  घर_पर|कमरे_में
दोस्तों_से_बात:f3|फ़ोन_पर_बात:f3               कर   a  शाम_को|रात_को       घर_पर|छत_पर
पौधों_को_पानी:m3|चिड़ियों_को_दाना:m3|गाय_को_रोटी:f3  दे  a  सुबह|शाम_को        _
साइकिल:f3                          चला   k  सुबह|शाम_को        मैदान_में|पार्क_में
:                                            दौड़   k  सुबह|शाम_को        मैदान_में|पार्क_में
:                                            टहल   a  सुबह|शाम_को        पार्क_में|बगीचे_में|नदी_के_किनारे
:                                            नाच   k  शाम_को            घर_पर|दोस्तों_के_साथ
दोस्तों_से:                                      मिल   a  शाम_को|दोपहर_में      पार्क_में|बाज़ार_में
गाना:m3|तैरना:m3|खाना_बनाना:m3|अंग्रेज़ी:f3|गिटार_बजाना:m3  सीख  k  सुबह|शाम_को  _
"""

# ------------------------------------------------------------------------------------------------- every other word, typed
INVARIABLE = "बढ़िया"                             # ends like an adjective that agrees, but does not
WORDS = """
मैं main  मेरा mera  मैंने maine  मुझे mujhe  मुझसे mujhse  मुझ mujh  हम hum  हमारा hamara  हमने humne  हमें humein  हमसे humse
तुम tum  तुम्हारा tumhara  तुमने tumne  तुम्हें tumhein  तुमसे tumse  आप aap  आपका aapka  आपने aapne  आपको aapko  आपसे aapse  वह wo
उसका uska  उसने usne  उसे use  उससे usse  उस us  वे wo  उनका unka  उन्होंने unhone  उन्हें unhein  उनसे unse  उन un  यह yeh
इस is  इसे ise  इससे isse  इसमें ismein  किस kis  किसका kiska  किससे kisse  किसी kisi  कोई koi  जो jo  जिसका jiska
जिसे jise  जिसमें jismein  का ka  को ko  से se  ने ne  पर par  में mein  तक tak  साथ saath  पास paas  बाद baad  पहले pehle
बीच beech  पीछे peeche  आगे aage  ऊपर oopar  नीचे neeche  सामने saamne  बाहर baahar  किनारे kinare  दूर door  तरफ़ taraf
बिना bina  लिए liye  अनुसार anusaar  वजह wajah  तरह tarah  और aur  या ya  लेकिन lekin  क्योंकि kyunki  इसलिए isliye  तो to
कि ki  अगर agar  जब jab  तब tab  तभी tabhi  फिर phir  भी bhi  ही hi  नहीं nahi  न na  मत mat  हाँ haan  जी ji  क्या kya
क्यों kyun  कब kab  कहाँ kahan  कहीं kahi  कैसे kaise  कौन kaun  कितना kitna  कितनी kitni  कितने kitne  यहाँ yahan  वहाँ wahan
यहीं yahin  वहीं wahin  यही yahi  ऐसे aise  ऐसी aisi  इतने itne  इतना itna  ऐसा aisa  कैसा kaisa  सा sa  सी si  आज aaj
कल kal  परसों parson  अभी abhi  अब ab  कभी kabhi  कभी-कभी kabhi-kabhi  रोज़ roz  हर har  हमेशा hamesha  अक्सर aksar
आजकल aajkal  सुबह subah  दोपहर dopahar  शाम shaam  रात raat  दिन din  दिनों dinon  हफ़्ते hafte  महीने mahine  साल saal
समय samay  बजे baje  बज baj  मिनट minute  घंटे ghante  देर der  जल्दी jaldi  तुरंत turant  अचानक achanak
धीरे-धीरे dheere-dheere  बार baar  बार-बार baar-baar  लगातार lagataar  एक ek  दो do  तीन teen  चार chaar  पाँच paanch
छह chhah  दस das  बीस bees  कई kai  कुछ kuch  सब sab  सबका sabka  सबकी sabki  सबके sabke  सबको sabko  सबने sabne
सबसे sabse  दोनों dono  दूसरे doosre  दूसरों doosron  बहुत bahut  काफ़ी kaafi  थोड़ा thoda  ज़्यादा zyada  कम kam  सिर्फ़ sirf
केवल keval  पूरा poora  पूरे poore  सारा saara  बिल्कुल bilkul  खूब khoob  कुल kul  आखिर aakhir  आखिरी aakhiri  अंत ant
शुरू shuru  अगला agla  अगले agle  अगली agli  पिछला pichhla  पिछले pichhle  पिछली pichhli  सिर sir  आँच aanch  दही dahi
घी ghee  तेल tel  नमक namak  मिर्च mirch  हल्दी haldi  जीरा jeera  धनिया dhaniya  नींबू neembu  अदरक adrak  इलायची elaichi
चीनी cheeni  चावल chawal  रोटी roti  प्याज़ pyaaz  नीम neem  आसमान aasmaan  सूरज sooraj  बिजली bijli  तापमान taapmaan
विभाग vibhag  राहत raahat  आग aag  भारत bharat  उत्तर uttar  दक्षिण dakshin  भगवान bhagwan  ज़िंदगी zindagi  बचपन bachpan
रौनक raunak  खुशी khushi  भूख bhookh  नींद neend  डर dar  दर्द dard  बुखार bukhar  खाँसी khaansi  तबीयत tabiyat
तकलीफ़ takleef  परेशानी pareshani  चिंता chinta  दुख dukh  गुस्सा gussa  दया daya  हँसी hansi  हिम्मत himmat  धीरज dheeraj
मुसीबत museebat  मदद madad  मेहनत mehnat  ईमानदारी imaandari  तारीफ़ tareef  माफ़ maaf  माफ़ी maafi  प्यार pyaar  इज़्ज़त izzat
भरोसा bharosa  ध्यान dhyaan  याद yaad  इंतज़ार intezaar  कोशिश koshish  देखभाल dekhbhal  मज़ा maza  मन man  दिल dil
जन्मदिन janmdin  सलाह salaah  सवाल sawaal  काम kaam  आराम aaraam  योग yoga  व्यायाम vyayam  अभ्यास abhyaas  पढ़ाई padhai
तैयारी taiyari  होमवर्क homework  प्रतियोगिता pratiyogita  बराबरी barabari  ताली taali  शोर shor  झगड़ा jhagda
दोस्ती dosti  छाया chhaya  संगीत sangeet  शतरंज shatranj  लूडो ludo  कैरम carrom  मोती moti  चीकू cheeku  मिट्ठू mitthu
नमस्ते namaste  हैलो hello  शुक्रिया shukriya  धन्यवाद dhanyavaad  शाबाश shabash  वाह waah  अरे are  ना na  यार yaar
भैया bhaiya  साहब sahab  सर sir  किलो kilo  कुल kul  ज़ोर zor  पैदल paidal  वापस wapas  शुरू shuru  खत्म khatm  साफ़ saaf
बंद band  ठीक theek  सही sahi  गलत galat  खाली khaali  खर्च kharch  पसंद pasand  आसान aasan  कठिन kathin  मुश्किल mushkil
ज़रूरी zaroori  ज़रूर zaroor  शायद shayad  असली asli  सच sach  तेज़ tez  गरम garam  खराब kharab  लाल laal  सफ़ेद safed
गुलाबी gulabi  बढ़िया badhiya  सुंदर sundar  शानदार shaandar  ईमानदार imaandar  दयालु dayalu  समझदार samajhdar
मेहनती mehnati  बहादुर bahadur  आलसी aalsi  गरीब gareeb  बीमार beemar  ताकतवर taakatvar  सुरक्षित surakshit  मशहूर mashhoor
तैयार taiyar  खास khaas  बाकी baaki  खुश khush  उदास udaas  परेशान pareshan  नाराज़ naraz  चुपचाप chupchaap
घर_वाले ghar_wale  अँधेरे andhere  अंक ank  अख़बार akhbaar  कक्षा kaksha  कड़ाही kadhai  कप cup  करके karke  खरीदीं khareedi
गरमी garmi  गेहूँ gehun  चली chali  टीवी tv  टेंशन tension  ट्रैफ़िक traffic  ठंड thand  डिग्री degree  दाईं daayin  बाईं baayin
दाम daam  नाम naam  नोट्स notes  पत्ती patti  पाठ paath  बड़ों badon  बिस्कुट biscuit  भाव bhaav  भीड़ bheed  मौसम mausam
रसोई rasoi  राजा raja  रुपये rupaye  रेडियो radio  लू loo  वालों walon  सर्दी sardi  स्टॉप stop  स्वाद swaad  किस kis
करूँ karun  जाऊँ jaun  दूँ dun  लूँ lun  रहूँ rahun  लिखूँ likhun  पढ़ूँ padhun  खरीदूँ khareedun  बदलूँ badlun  बताऊँ bataun
मनाऊँ manaun  समझाऊँ samjhaun  माँगूँ maangun  जाए jaye  जाएँ jayein  पिएँ piyein  बचें bachein  हों hon  चाहिए chahiye
चुकी chuki  पड़ pad  पड़ा pada  पड़ेगी padegi  लेनी leni  बढ़ badh  बढ़ेगी badhegi  घूमेंगे ghoomenge  चलेंगे chalenge  लगेंगे lagenge
रखे rakhe  पकड़ pakad  पकड़कर pakadkar  थामकर thaamkar  जोड़कर jodkar  भाग bhaag  भागने bhaagne  भीग bheeg  भर bhar
बदल badal  बन ban  बनना banna  जाग jaag  जीत jeet  हार haar  फँस phans  छूट chhoot  छोड़ chhod  खो kho  खुदवाया khudwaya
बसा basa  छिपा chhipa  दबा daba  भरा bhara  बजा baja  बो bo  छाए chhaye  छानकर chhaankar  ढककर dhakkar  थक thak
थककर thakkar  डरकर darkar  डरते darte  कूदने koodne  हँसाने hansane  बिताना bitana  पहनकर pahankar  पहनना pahanna
पहने pahne  मुड़िए mudiye  मिलाइए milaiye  मिलाकर milakar  भिगोइए bhigoiye  सँभालकर sambhalkar  सँभालती sambhalti
पढ़ाती padhati  पढ़ाया padhaya  पिलाया pilaya  बैठाया baithaya  लगाया lagaya  सजाया sajaya  दिखाया dikhaya  दिखाईं dikhayi
सुनाई sunai  सुनाओ sunao  सुनाती sunati  सिखा sikha
"""

# masculine singular; every form may be used
AGREEING = """
लड़ा lada  सिखाता sikhata  सिखाएगा sikhayega  खिलाया khilaya  खिलाएगा khilayega  खोदता khodta  पाया paya  खिला khila
खिलता khilta  अच्छा accha  नया naya  पुराना purana  बड़ा bada  छोटा chhota  प्यारा pyara  ठंडा thanda  हल्का halka
सुहाना suhana  पक्का pakka  सच्चा saccha  घना ghana  पतला patla  सीधा seedha  बूढ़ा boodha  भूखा bhookha  प्यासा pyaasa  अकेला akela
दूसरा doosra  बुरा bura  नीला neela  पीला peela  हरा hara  काला kaala  ताज़ा taaza  मीठा meetha  सस्ता sasta  महँगा mehnga
थोड़ा thoda  सारा saara  पूरा poora  इतना itna  कितना kitna  ऐसा aisa  कैसा kaisa  सा sa  किसका kiska  अपना apna
अगला agla  पिछला pichhla  धीमा dheema  वाला wala
"""

# How one person types. Each line is one habit: the first spelling is that of the tables, `|` separates the others, listed as
# often as they are common; all words of a line change together.
SPELLINGS = """
main | mai | mai | mai | mai
hoon | hu | hu | hun
nahi | nahi | nahi | nahin
bahut | bahut | bohot
accha acche acchi | acha ache achi | accha acche acchi
kyunki | kyuki | kyunki
phir | fir
wo | woh | wo
yeh | ye | ye
zyada | jyada
thoda thode thodi | thoda thode thodi | thora thore thori
bazaar | bazaar | bazaar | bazaar | bazar | market
dost doston dosti | dost doston dosti | friend friends friendship
pariksha | exam
kahani | kahani | story
kitaab kitaabein | kitab kitabein | book books
film | movie
samay | time
roz | roz | daily
rupaye | rs
karun jaun dun lun likhun padhun | karun jaun dun lun likhun padhun | karu jau du lu likhu padhu
mein | me | me
mujhe | mujhe | mujhe | muje
hum | hum | ham
gaya gaye gayi | gaya gaye gayi | gaya gae gai
baarish | barish
raaste raasta | raste rasta
paani | pani
aaya aaye aayi | aya aye ayi | aaya aaye aayi
"""
